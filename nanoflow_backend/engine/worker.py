"""Worker: one rank's weights, pages and program; turns a Batch into device inputs, and logits into samples.

T tokens of the batch, R rows that are sampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nanoflow_backend.config import EngineConfig, ModelConfig
from nanoflow_backend.engine.sampling import Sampler
from nanoflow_backend.kvcache import storage
from nanoflow_backend.models import weights
from nanoflow_backend.models.model import build
from nanoflow_backend.runtime.collectives import Collectives
from nanoflow_backend.runtime.cpu import CpuProgram
from nanoflow_backend.runtime.program import Program
from nanoflow_backend.schedule.source import find_schedule
from nanoflow_backend.scheduler.batch import Batch, Sampled, TokenLogprobs


@dataclass
class Launched:
    """A step on its way."""

    batch: Batch
    rows: list[int]  # R, into the batch's tokens: where it samples
    positions: list[int]  # R, of the tokens in those rows
    token_ids: Tensor | None = None  # int64 [R], once the tail is launched
    logprobs: dict[int, TokenLogprobs] | None = None


class Worker:
    """One rank out of `config.tensor_parallel`. Every rank launches the same batches in the same order."""

    def __init__(self, config: EngineConfig, model_config: ModelConfig, max_model_tokens: int, rank: int = 0) -> None:
        tp, dtype, page_tokens = config.tensor_parallel, getattr(torch, config.dtype), config.page_tokens
        num_slots = config.max_running or config.dense_batch_tokens
        model = build(model_config, tp)
        self.program: Program = CpuProgram(
            model,
            find_schedule(config, model),
            weights.load(Path(config.model), model_config, model, rank=rank, tp=tp, dtype=dtype),
            storage.allocate(model_config, config.num_pages, page_tokens, dtype, tp),
            Collectives(tp),
            max_tokens=config.dense_batch_tokens,
            dtype=dtype,
        )
        self._sampler = Sampler(num_slots, model_config.vocab_size, model_config.eos_token_ids)
        self._page_table = torch.zeros(num_slots, -(-max_model_tokens // page_tokens), dtype=torch.int32)
        # The last sampled id of each slot: the next step reads its decode inputs here, the host sees them later.
        self._last_sampled = torch.zeros(num_slots, dtype=torch.int64)

    def launch_forward(self, batch: Batch) -> Launched:
        """Embedding and layers on all T tokens."""
        self._sampler.admit(batch.admitted)
        if batch.page_table:
            slot, index, page = torch.tensor(batch.page_table, dtype=torch.int32).T
            self._page_table[slot, index] = page

        decodes = len(batch.decode_slots)
        slots, positions = list(batch.decode_slots), list(batch.decode_positions)
        rows, prompt_ids = list(range(decodes)), []
        for prefill in batch.prefills:
            count = len(prefill.token_ids)
            slots += [prefill.slot] * count
            positions += range(prefill.start, prefill.start + count)
            prompt_ids += prefill.token_ids
            if prefill.sample:
                rows.append(len(slots) - 1)

        slot_of_row = torch.tensor(slots, dtype=torch.int32)
        token_ids = torch.empty(len(slots), dtype=torch.int32)
        token_ids[:decodes] = self._last_sampled[slot_of_row[:decodes]]
        token_ids[decodes:] = torch.tensor(prompt_ids, dtype=torch.int32)
        self.program.forward(token_ids, torch.tensor(positions, dtype=torch.int32), slot_of_row, self._page_table)
        return Launched(batch, rows, [positions[row] for row in rows])

    def launch_tail(self, launched: Launched) -> None:
        """LM head and sampling on the R rows that decode or end a prompt."""
        slots = launched.batch.sampled_slots
        logits = self.program.head(torch.tensor(launched.rows, dtype=torch.int64))
        launched.token_ids, launched.logprobs = self._sampler.sample(logits, slots, launched.positions)
        self._last_sampled[torch.tensor(slots, dtype=torch.int64)] = launched.token_ids

    def collect(self, launched: Launched) -> Sampled:
        """Wait for a step's samples and bring them to the host."""
        if launched.token_ids is None or launched.logprobs is None:
            raise RuntimeError("collect comes after launch_tail")
        return Sampled(launched.batch.step, launched.token_ids.tolist(), launched.logprobs)
