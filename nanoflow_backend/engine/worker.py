"""Worker is one rank at work: it turns a Batch into device inputs, runs the program, and samples from its logits.

T tokens of the batch, R rows that are sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from nanoflow_kernels import reference_sampling
from torch import Tensor

from nanoflow_backend.config.settled import Settled
from nanoflow_backend.engine.program_builder import ProgramBuilder
from nanoflow_backend.engine.step_inputs import StepInputs
from nanoflow_backend.engine.tiers.builder import make_transfers
from nanoflow_backend.kvcache.tier import PageStore, TransferReport
from nanoflow_backend.runtime.collectives.protocol import Collectives
from nanoflow_backend.runtime.device import find_device
from nanoflow_backend.runtime.transfer import to_device, to_host
from nanoflow_backend.sampling.constraints import Masks
from nanoflow_backend.sampling.prompt_scorer import PromptScorer, Scored
from nanoflow_backend.sampling.sampler import Drawn, Sampler, warm_up
from nanoflow_backend.scheduler.batch import Batch, Sampled

KINDS_OF_ROWS = (1, 2, 16)  # numbers of rows for which kernels are compiled: one, any, and multiples of 16


@dataclass
class InFlightStep:
    """A step that was launched and is not collected yet.

    What is `to host` is on its way there, and may be read once `ended` has come.
    """

    batch: Batch  # host
    inputs: StepInputs  # host
    rows: Tensor  # device; int32 [R], where the sampled rows lie
    slots: Tensor  # device; int32 [R], of those rows
    launched: bool = False  # the tail, too
    drawn: Drawn | None = None  # token ids on the device, log-probabilities to host; None where there are no rows
    token_ids: Tensor | None = None  # to host; int64 [R]
    scored: list[Scored] = field(default_factory=list)  # to host; log-probabilities of prompts
    ended: torch.cuda.Event | None = None  # device; None on the CPU, where a launch returns when it is done


class Worker:
    """One rank out of `config.tensor_parallel`. Every rank launches the same batches in the same order.

    On a GPU nothing but `collect` waits for it.

    Args:
        collectives: of this rank; None: it is the only one.

    Raises:
        ConfigError: no such device, or too little memory on it.
        ScheduleError: the schedule does not fit the model or the device.
    """

    def __init__(self, settled: Settled, rank: int = 0, collectives: Collectives | None = None) -> None:
        config, model_config = settled.config, settled.model_config
        self.device = find_device(config.device)
        self._torch_device = torch.device(config.device)
        builder = ProgramBuilder(settled, self.device, rank, collectives)  # first: it says what does not fit
        # The last sampled id of each slot: the next step reads its decode inputs here, the host sees them later.
        self._last_sampled = torch.zeros(config.max_running, dtype=torch.int32, device=self._torch_device)
        kernels, vocab_size = builder.kernels or reference_sampling, model_config.vocab_size
        self._sampler = Sampler(config.max_running, vocab_size, model_config.eos_token_ids, kernels, self._torch_device)
        self._scorer = PromptScorer(vocab_size, kernels, self._torch_device, config.max_running)
        self.program, self._page_table, self.num_pages = builder.build()
        self._transfers = make_transfers(settled, builder.kv, builder.host_slots, rank)
        self._ended: dict[int, torch.cuda.Event] = {}  # by step, of those whose end transfers may have to wait for
        if builder.kernels:
            for rows in KINDS_OF_ROWS:
                some = torch.zeros(min(rows, config.max_running), dtype=torch.int32, device=self._torch_device)
                warm_up(self.program.head(some), vocab_size, builder.kernels)

    def warm_up(self) -> None:
        """Compile and capture again what batches will run, as at the start, when the program is to be watched. No
        request may have pages: they are overwritten."""
        self.program.warm_up(self._page_table)

    def launch_forward(self, batch: Batch) -> InFlightStep:
        """Embedding and layers on all T tokens, and transfers beside them.

        Raises: ValueError, the batch has transfers, and there is no tier below the device.
        """
        self._begin_transfers(batch)
        self._sampler.admit(batch.admitted)
        self._scorer.admit(batch.admitted)
        plan = self.program.plan_for(batch.tokens, batch.decode_kv_tokens) if batch.tokens else None
        inputs = StepInputs.pack(batch, plan.groups if plan else ())
        layout = inputs.layout
        slots, positions, prompt_ids, listed, rows, sampled_slots, *entries = self._send(
            inputs.slots,
            inputs.positions,
            inputs.prompt_ids,
            layout.listed if layout else (),
            inputs.sampled_rows,
            inputs.sampled_slots,
            *inputs.page_table,
        )
        if batch.page_table:
            slot, index, page = entries
            self._page_table[slot, index] = page
        if plan is None:
            return InFlightStep(batch, inputs, rows, sampled_slots)
        token_ids = torch.cat((self._last_sampled[slots[: len(batch.decode_slots)]], prompt_ids))
        if layout:
            token_ids, positions, slots = torch.stack((token_ids, positions, slots)).index_select(1, listed)
        self.program.forward(plan, token_ids, positions, slots, self._page_table)
        return InFlightStep(batch, inputs, rows, sampled_slots)

    def launch_tail(self, step: InFlightStep, masks: Masks | None = None) -> None:
        """LM head and sampling on the R rows that decode or end a prompt; the head on prompts that are scored, too."""
        if step.batch.tokens:
            self._sample(step, masks)
        if self.device.kind == "cuda":
            step.ended = torch.cuda.Event(blocking=True)  # the engine's thread sleeps meanwhile
            step.ended.record()
            if self._transfers:
                self._ended[step.batch.step] = step.ended
        step.launched = True

    def _sample(self, step: InFlightStep, masks: Masks | None) -> None:
        inputs = step.inputs
        step.scored = self._scorer.score(step.batch, inputs.layout, self.program.head)
        logits = self.program.head(step.rows)
        step.drawn = self._sampler.sample(logits, inputs.sampled_slots, inputs.sampled_positions, masks)
        self._last_sampled[step.slots] = step.drawn.token_ids.int()
        step.token_ids = to_host(step.drawn.token_ids)

    def collect(self, step: InFlightStep) -> Sampled:
        """Wait for a step's samples, which come to the host. Raises: RuntimeError, before launch_tail."""
        if not step.launched:
            raise RuntimeError("collect comes after launch_tail")
        if step.ended:
            step.ended.synchronize()
        transfers = self.report_transfers(wait=not step.batch.tokens)
        if step.drawn is None or step.token_ids is None:
            return Sampled(step.batch.step, [], transfers=transfers)
        scores = [scored.scores() for scored in step.scored]
        return Sampled(step.batch.step, step.token_ids.tolist(), step.drawn.logprobs.by_slot(), scores, transfers)

    def report_transfers(self, *, wait: bool = False) -> TransferReport | None:
        """What has become of transfers since the last call; `wait` gives them a moment, as a step without rows does.

        None: there are no tiers below the device.
        """
        return self._transfers.report(wait=wait) if self._transfers else None

    @property
    def page_store(self) -> PageStore | None:
        """Where this rank's pages outlive it."""
        return self._transfers.store if self._transfers else None

    def close(self) -> None:
        """End transfers, and give host memory back, and what CUDA graphs hold."""
        if self._transfers:
            self._transfers.close()
        self.program.close()

    def _begin_transfers(self, batch: Batch) -> None:
        """Beside this step, and after those that had come back to the scheduler: on other ranks they may still run."""
        if self._transfers is None:
            if batch.transfers:
                raise ValueError(
                    f"transfers: expected none, as there is no tier below the device, got {batch.transfers}"
                )
            return
        after = self._ended.get(batch.returned)
        self._ended = {step: ended for step, ended in self._ended.items() if step >= batch.returned}
        self._transfers.begin(batch.transfers, after)

    def _send(self, *columns: Sequence[int] | np.ndarray) -> list[Tensor]:
        """int32 on the device, all columns in one copy."""
        ints = to_device(np.concatenate([np.asarray(column, np.int32) for column in columns]), self._torch_device)
        return list(ints.split([len(column) for column in columns]))
