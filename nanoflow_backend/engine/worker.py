"""Worker: one rank's weights, pages and program; turns a Batch into device inputs, and logits into samples.

T tokens of the batch, R rows that are sampled.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from nanoflow_kernels import reference_sampling
from torch import Tensor

from nanoflow_backend.config.engine_config import SettledConfig
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.model_config import ModelConfig
from nanoflow_backend.engine.memory import GIB, check_room
from nanoflow_backend.graph.model import Model
from nanoflow_backend.kvcache import storage
from nanoflow_backend.models import weights
from nanoflow_backend.models.model import build
from nanoflow_backend.runtime.collectives import Collectives
from nanoflow_backend.runtime.cpu import CpuProgram
from nanoflow_backend.runtime.cuda import CudaProgram
from nanoflow_backend.runtime.device import Device, find_device
from nanoflow_backend.runtime.program import Program
from nanoflow_backend.runtime.transfer import to_device, to_host
from nanoflow_backend.sampling.constraints import Masks
from nanoflow_backend.sampling.prompt_scorer import PromptScorer, Scored
from nanoflow_backend.sampling.sampler import Drawn, Sampler
from nanoflow_backend.schedule.layout import Layout, deal
from nanoflow_backend.schedule.plan import Schedule
from nanoflow_backend.schedule.source import find_schedules
from nanoflow_backend.scheduler.batch import Batch, Sampled

log = logging.getLogger(__name__)


@dataclass
class Launched:
    """A step on its way. Tensors are on the device, but for `drawn` and `token_ids`, which come to the host; arrays
    are on the host."""

    batch: Batch
    layout: Layout | None  # of the batch's rows; None: they lie as the batch lists them
    rows: Tensor  # int32 [R], where they lie: the batch samples there
    slots: Tensor  # int32 [R], of those rows
    host_slots: np.ndarray  # the same
    positions: np.ndarray  # int32 [R], of the tokens in those rows
    drawn: Drawn | None = None  # once the tail is launched; to be read when `ended` has come
    token_ids: Tensor | None = None
    scored: list[Scored] = field(default_factory=list)
    ended: torch.cuda.Event | None = None  # None on the CPU, where a launch returns when it is done


class Worker:
    """One rank out of `config.tensor_parallel`. Every rank launches the same batches in the same order.

    On a GPU nothing but `collect` waits for it.
    """

    def __init__(self, config: SettledConfig, model_config: ModelConfig, max_model_tokens: int, rank: int = 0) -> None:
        self.device = find_device(config.device)
        self._torch_device = torch.device(config.device)
        page_table_shape = (config.max_running, -(-max_model_tokens // config.page_tokens))
        self._page_table = torch.zeros(page_table_shape, dtype=torch.int32, device=self._torch_device)
        # The last sampled id of each slot: the next step reads its decode inputs here, the host sees them later.
        self._last_sampled = torch.zeros(config.max_running, dtype=torch.int32, device=self._torch_device)
        # The kernel language is there where a GPU is.
        kernels = import_module("nanoflow_kernels.device") if config.device == "cuda" else None
        self._sampler = Sampler(
            config.max_running,
            model_config.vocab_size,
            model_config.eos_token_ids,
            kernels or reference_sampling,
            self._torch_device,
        )
        self._scorer = PromptScorer(
            model_config.vocab_size, kernels or reference_sampling, self._torch_device, config.max_running
        )
        try:
            self.program, self.num_pages = _program(config, model_config, self.device, kernels, self._page_table, rank)
        except torch.OutOfMemoryError as error:  # of the workspace: the rest was reckoned before
            raise ConfigError(
                f"out of memory: lower dense_batch_tokens ({config.dense_batch_tokens}), kv_cache_tokens "
                f"({config.kv_cache_tokens}) or gpu_memory_utilization ({config.gpu_memory_utilization}): {error}"
            ) from None

    def launch_forward(self, batch: Batch) -> Launched:
        """Embedding and layers on all T tokens."""
        self._sampler.admit(batch.admitted)
        self._scorer.admit(batch.admitted)
        decodes = len(batch.decode_slots)
        slots, positions = list(batch.decode_slots), list(batch.decode_positions)
        prompt_ids: list[int] = []
        ends: list[int] = []  # rows that end the known tokens of their request
        for prefill in batch.prefills:
            count = len(prefill.token_ids)
            slots += [prefill.slot] * count
            positions += range(prefill.start, prefill.start + count)
            prompt_ids += prefill.token_ids
            if prefill.sample:
                ends.append(len(slots) - 1)
        rows = np.concatenate((np.arange(decodes, dtype=np.int32), np.array(ends, np.int32)))
        slot_of, position_of = np.array(slots, np.int32), np.array(positions, np.int32)
        sampled_slots = slot_of[rows]
        decode_kv_tokens = int(position_of[:decodes].sum()) + decodes  # each reads those before it, and itself
        plan = self.program.plan_for(len(slots), decode_kv_tokens)
        layout = deal(decodes, len(slots), plan.groups)
        listed, places = (layout.listed, layout.place[rows]) if layout else ((), rows)
        entries = zip(*batch.page_table, strict=True) if batch.page_table else ((), (), ())
        slots_, positions_, prompt_ids_, listed_, rows_, sampled_, *entry = self._send(
            slot_of, position_of, prompt_ids, listed, places, sampled_slots, *entries
        )
        if batch.page_table:
            slot, index, page = entry
            self._page_table[slot, index] = page
        token_ids = torch.cat((self._last_sampled[slots_[:decodes]], prompt_ids_))
        if layout:
            token_ids, positions_, slots_ = torch.stack((token_ids, positions_, slots_)).index_select(1, listed_)
        self.program.forward(plan, token_ids, positions_, slots_, self._page_table)
        return Launched(batch, layout, rows_, sampled_, sampled_slots, position_of[rows])

    def launch_tail(self, launched: Launched, masks: Masks | None = None) -> None:
        """LM head and sampling on the R rows that decode or end a prompt; the head on prompts that are scored, too."""
        launched.scored = self._scorer.score(launched.batch, launched.layout, self.program.head)
        logits = self.program.head(launched.rows)
        launched.drawn = self._sampler.sample(logits, launched.host_slots, launched.positions, masks)
        self._last_sampled[launched.slots] = launched.drawn.token_ids.int()
        launched.token_ids = to_host(launched.drawn.token_ids)
        if self.device.kind == "cuda":
            launched.ended = torch.cuda.Event(blocking=True)  # the engine's thread sleeps meanwhile
            launched.ended.record()

    def collect(self, launched: Launched) -> Sampled:
        """Wait for a step's samples, which come to the host."""
        if launched.drawn is None or launched.token_ids is None:
            raise RuntimeError("collect comes after launch_tail")
        if launched.ended:
            launched.ended.synchronize()
        scores = [scored.scores() for scored in launched.scored]
        return Sampled(launched.batch.step, launched.token_ids.tolist(), launched.drawn.logprobs.by_slot(), scores)

    def _send(self, *columns: Sequence[int] | np.ndarray) -> list[Tensor]:
        """int32 on the device, all columns in one copy."""
        ints = to_device(np.concatenate([np.asarray(column, np.int32) for column in columns]), self._torch_device)
        return list(ints.split([len(column) for column in columns]))


def _program(
    config: SettledConfig,
    model_config: ModelConfig,
    device: Device,
    kernels: ModuleType | None,
    page_table: Tensor,
    rank: int,
) -> tuple[Program, int]:
    """The program on its weights and pages, and how many pages those are.

    Raises:
        ConfigError: too little memory.
    """
    tp, precision = config.tensor_parallel, config.precision
    kv_dtype = getattr(torch, precision.kv)
    model = build(model_config, tp)
    for line in _implementations(model, kernels) if kernels else ():
        log.info("%s", line)
    schedules = find_schedules(config, model, device.name, device.sms)
    if len(schedules) > 1:
        log.info("schedules for batches of up to %s", ", ".join(map(_batches, schedules)))
    free_bytes = device.free_bytes() // (tp if device.kind == "cpu" else 1)
    check_room(config, model_config, weights.size_bytes(model, precision), free_bytes, device.name)
    if config.load_format == "dummy":
        loaded = weights.dummy(model, precision=precision, device=device.kind)
    else:
        folder = Path(config.model)
        loaded = weights.load(folder, model_config, model, rank=rank, tp=tp, precision=precision, device=device.kind)

    def program(num_pages: int, *, trial: bool = False) -> Program:
        kv = storage.allocate(model_config, num_pages, config.page_tokens, kv_dtype, tp, device=device.kind)
        if kernels is None:
            return CpuProgram(
                model, schedules, loaded, kv, Collectives(tp), max_tokens=config.dense_batch_tokens, precision=precision
            )
        made = CudaProgram(
            model,
            schedules,
            loaded,
            kv,
            Collectives(tp),
            max_tokens=config.dense_batch_tokens,
            max_rows=config.max_running,
            kernels=kernels,
            precision=precision,
            cuda_graphs=config.cuda_graphs,
        )
        if trial:
            made.fill(page_table)
        else:
            made.warm_up(page_table)
        return made

    num_pages = -(-config.kv_cache_tokens // config.page_tokens) if config.kv_cache_tokens else None
    if num_pages is None:
        tried = program(num_pages=1, trial=True)
        num_pages = device.free_bytes(config.gpu_memory_utilization) // storage.page_bytes(
            model_config, config.page_tokens, kv_dtype, tp
        )
        del tried
        torch.cuda.empty_cache()
        if num_pages < 1:
            raise ConfigError(
                f"gpu_memory_utilization: {config.gpu_memory_utilization:.0%} of the memory of {device.name}, of which "
                f"{free_bytes / GIB:.2f} GiB were free, leave no room for KV pages beside weights of "
                f"{weights.size_bytes(model, precision) / GIB:.2f} GiB and the workspace of dense_batch_tokens "
                f"{config.dense_batch_tokens}"
            )
    return program(num_pages), num_pages


def _batches(schedule: Schedule) -> str:
    asked = schedule.least_decode_kv_tokens
    return f"{schedule.tokens} tokens" + (f" whose decodes read {asked} or more of the KV cache" if asked else "")


def _implementations(model: Model, kernels: ModuleType) -> list[str]:
    """A line for each kernel: what runs it and why, and the operations that use it."""
    users: dict[str, list[str]] = {}
    for graph in (model.embed, *model.layers, model.head):
        for operation in graph.operations:
            users.setdefault(operation.kernel, []).append(operation.name)
    notes = kernels.IMPLEMENTATIONS
    return [f"{kernel} ({', '.join(names)}): {notes[kernel]}" for kernel, names in users.items() if kernel in notes]
