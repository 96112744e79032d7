"""ProgramBuilder makes the program of one rank in three steps: load weights, size the KV cache, make the program."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from nanoflow_kernels import reference
from torch import Tensor

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.settled import Settled
from nanoflow_backend.engine.memory import GIB, check_host_room, check_room
from nanoflow_backend.graph.collectives import with_parameters
from nanoflow_backend.graph.model import Model
from nanoflow_backend.kvcache.host_pool import slot_bytes
from nanoflow_backend.kvcache.kv_pages import KvPages, page_bytes
from nanoflow_backend.models import weights
from nanoflow_backend.models.model import build
from nanoflow_backend.runtime.binding import Binding
from nanoflow_backend.runtime.collectives.group import least
from nanoflow_backend.runtime.collectives.one_rank import OneRank
from nanoflow_backend.runtime.collectives.protocol import Collectives
from nanoflow_backend.runtime.cpu import CpuProgram
from nanoflow_backend.runtime.cuda import ON_GPU, CudaProgram
from nanoflow_backend.runtime.device import Device
from nanoflow_backend.runtime.host_memory import available_bytes
from nanoflow_backend.runtime.program import Program
from nanoflow_backend.schedule.plan import Schedule
from nanoflow_backend.schedule.source import find_schedules

log = logging.getLogger(__name__)


class ProgramBuilder:
    """What a program is made of before there is memory for it: the model's graphs, schedules and kernels.

    Attributes:
        kv: the pages of the last program.
        host_slots: pages that this rank may keep in host memory.

    Raises:
        ConfigError: weights, or the KV cache or batch that is configured, do not fit.
        ScheduleError: the schedule does not fit the model or the device.
    """

    def __init__(self, settled: Settled, device: Device, rank: int = 0, collectives: Collectives | None = None) -> None:
        self.collectives = collectives or OneRank()
        self.config, self.model_config, self.device, self.rank = settled.config, settled.model_config, device, rank
        self.max_model_tokens = settled.max_model_tokens
        self.tp, self.precision = self.config.tensor_parallel, self.config.precision
        self.kv_dtype = getattr(torch, self.precision.kv)
        self.model = build(self.model_config, self.tp)
        self.schedules = find_schedules(self.config, self.model, device.name, device.sms)
        # Plans may want other parts of a weight: what an all-reduce follows, or gathers.
        self._loaded = with_parameters(self.model, [plan.all_reduces for plan in self.schedules], self.tp)
        self.weights_bytes = weights.size_bytes(self._loaded, self.precision)
        self.bytes_a_page = page_bytes(self.model_config, self.config.page_tokens, self.kv_dtype, self.tp)
        self.kernels = find_kernels(device)
        if self.kernels is not None:
            _log_implementations(self.model, self.kernels)
        if len(self.schedules) > 1:
            log.info("schedules for batches of up to %s", ", ".join(map(_batches, self.schedules)))
        self._sharing = self.tp // self.config.hosts if device.kind == "cpu" else 1  # ranks that have the same memory
        free_bytes = device.free_bytes() // self._sharing  # before anything is loaded
        check_room(self.config, self.model_config, self.weights_bytes, free_bytes, device.name)
        self.free_bytes = least(free_bytes)  # all ranks have as many pages
        self.host_slots = check_host_room(self.config, slot_bytes(self.bytes_a_page), self._host_free_bytes())

    def build(self) -> tuple[Program, Tensor, int]:
        """The program, ready to run; the page table that it is to read in every step; its KV cache's size in pages.

        Raises:
            ConfigError: too little memory, with the numbers and the settings to change.
        """
        try:
            loaded = self.load_weights()
            page_table = self.make_page_table()
            num_pages = self.size_kv_cache(loaded, page_table)
            program = self.make_program(loaded, num_pages)
            program.warm_up(page_table)
        except torch.OutOfMemoryError as error:  # of the workspace: the rest was reckoned before
            config = self.config
            raise ConfigError(
                f"out of memory: lower dense_batch_tokens ({config.dense_batch_tokens}), kv_cache_tokens "
                f"({config.kv_cache_tokens}) or gpu_memory_utilization ({config.gpu_memory_utilization}): {error}"
            ) from None
        return program, page_table, num_pages

    def load_weights(self) -> Mapping[str, Tensor]:
        """This rank's part of every parameter of the model, by name (see Binding), on the device."""
        model, precision, device = self._loaded, self.precision, self.device.kind
        if self.config.load_format == "dummy":
            return weights.dummy(model, precision=precision, device=device)
        folder = Path(self.config.model)
        return weights.load(
            folder, self.model_config, model, rank=self.rank, tp=self.tp, precision=precision, device=device
        )

    @property
    def most_pages(self) -> int:
        """Pages of the KV cache: as configured, or what weights leave of the free memory if there were no workspace."""
        if self.config.kv_cache_tokens is not None:
            return -(-self.config.kv_cache_tokens // self.config.page_tokens)
        return (self.free_bytes - self.weights_bytes) // self.bytes_a_page

    def _host_free_bytes(self) -> int:
        """What the host has left beside weights and KV cache, which a CPU has there, too."""
        if self.device.kind == "cuda":
            return available_bytes()
        return self._sharing * (self.free_bytes - self.weights_bytes - self.most_pages * self.bytes_a_page)

    def make_page_table(self) -> Tensor:
        """int32 [slots, pages of a request], on the device; a request has what model and KV cache hold, not more.

        A model may have 2^26 positions: a table for them all would be larger than the cache it points into.
        """
        pages = min(-(-self.max_model_tokens // self.config.page_tokens), max(self.most_pages, 1))
        return torch.zeros((self.config.max_running, pages), dtype=torch.int32, device=self.config.device)

    def size_kv_cache(self, loaded: Mapping[str, Tensor], page_table: Tensor) -> int:
        """The number of pages: as configured, or as many as fit beside weights and workspace.

        What the workspace takes is measured: a program with a single page runs the largest batch.
        """
        config = self.config
        if config.kv_cache_tokens is not None:
            return self.most_pages
        trial = self.make_program(loaded, num_pages=1)
        trial.fill(page_table)
        measured = self.device.free_bytes(config.gpu_memory_utilization) // self.bytes_a_page
        num_pages = least(
            min(measured, self.most_pages)
        )  # others may have freed memory: the page table has no place for it
        del trial
        torch.cuda.empty_cache()
        if num_pages < 1:
            raise ConfigError(
                f"gpu_memory_utilization: {config.gpu_memory_utilization:.0%} of the memory of {self.device.name}, of "
                f"which {self.free_bytes / GIB:.2f} GiB were free, leave no room for KV pages beside weights of "
                f"{self.weights_bytes / GIB:.2f} GiB and the workspace of dense_batch_tokens "
                f"{config.dense_batch_tokens}"
            )
        return num_pages

    def make_program(self, loaded: Mapping[str, Tensor], num_pages: int) -> Program:
        """A program on these weights and on `num_pages` pages of the KV cache, which it allocates."""
        config, device = self.config, self.device.kind
        kv = KvPages.allocate(self.model_config, num_pages, config.page_tokens, self.kv_dtype, self.tp, device=device)
        self.kv = kv
        binding = Binding(
            self.model,
            self.schedules,
            loaded,
            kv,
            self.collectives,
            self.kernels or reference,
            max_tokens=config.dense_batch_tokens,
            precision=self.precision,
            **(ON_GPU if self.kernels else {}),
        )
        if self.kernels is None:
            return CpuProgram(binding)
        return CudaProgram(binding, max_rows=config.max_running, cuda_graphs=config.cuda_graphs)


def find_kernels(device: Device) -> ModuleType | None:
    """The device's own kernels; None on a CPU, which runs the reference. The kernel language is there with a GPU."""
    return import_module("nanoflow_kernels.device") if device.kind == "cuda" else None


def _batches(schedule: Schedule) -> str:
    asked = schedule.least_decode_kv_tokens
    return f"{schedule.tokens} tokens" + (f" whose decodes read {asked} or more of the KV cache" if asked else "")


def _log_implementations(model: Model, kernels: ModuleType) -> None:
    operations = [operation for graph in (model.embed, *model.layers, model.head) for operation in graph.operations]
    for line in kernels.describe_implementations((operation.kernel, operation.name) for operation in operations):
        log.info("%s", line)
