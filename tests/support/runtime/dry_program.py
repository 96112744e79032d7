"""Programs without their arithmetic: what runs is what tags and waits have to say, so that thousands can be tried."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from nanoflow_kernels import reference
from support.models.batches import forward
from support.schedule.schedules import delayed

from nanoflow_backend.config.precision import FLOAT32
from nanoflow_backend.graph.model import Model
from nanoflow_backend.kvcache.kv_pages import KvPages
from nanoflow_backend.runtime.binding import Binding
from nanoflow_backend.runtime.collectives.one_rank import OneRank
from nanoflow_backend.runtime.collectives.protocol import Collectives
from nanoflow_backend.runtime.cpu import CpuProgram
from nanoflow_backend.runtime.tags import StaleRead
from nanoflow_backend.schedule.order import PartialOrder
from nanoflow_backend.schedule.plan import Schedule, Wait


def nothing(*_: object, **__: object) -> None:
    """A kernel that is never wrong: what is looked at here are the tags."""


NO_KERNELS = SimpleNamespace(**{name: nothing for name in vars(reference) if not name.startswith("_")})


class NoNetwork(OneRank):
    """One of two ranks, which exchanges nothing."""

    ranks = 2
    all_reduce = all_gather_rows = all_gather_columns = reduce_scatter_columns = staticmethod(nothing)
    reduce_scatter_add_rms_norm_all_gather = staticmethod(nothing)


def dry_program(model: Model, schedule: Schedule, collectives: Collectives | None = None) -> CpuProgram:
    """The program without its arithmetic."""
    graphs = {"": model.embed} | {f"layers.{i}.": graph for i, graph in enumerate(model.in_order)}
    named = [f"{prefix}{p.name}" for prefix, graph in graphs.items() for p in graph.parameters]
    weights = dict.fromkeys(named + [p.name for p in model.head.parameters], torch.empty(0))
    kv = KvPages(torch.empty(model.num_layers, 0, 2, 0, 0, 0))
    options: dict[str, Any] = {"max_tokens": schedule.tokens, "precision": FLOAT32}
    return CpuProgram(Binding(model, [schedule], weights, kv, collectives or OneRank(), NO_KERNELS, **options))


def run(program: CpuProgram, order: list[int]) -> None:
    """A full batch through all the tags, those that the head looks at too, as `forward` and `head` ask them."""
    tags = program.tags_of[program.binding.plans[0]]
    tags.embed()
    for step in order:
        tags.launch(step)
    tags.read_results()


def run_forward(program: CpuProgram, order: list[int]) -> None:
    """The same by the program's own forward."""
    ints = torch.zeros(program.binding.max_tokens, dtype=torch.int32)
    forward(program, (ints, ints, ints, ints[:, None]), order=order)
    program.tags.read_results()


def mutants(schedule: Schedule) -> Iterator[tuple[int, Wait]]:
    return ((number, wait) for number, launch in enumerate(schedule.launches) for wait in launch.waits)


def overtaken(order: PartialOrder, wait: Wait, number: int) -> Iterator[list[int]]:
    """The interleavings in which the launch that was waited for is late, layer by layer."""
    for layer, launch in order.steps:
        if launch == number and layer >= wait.layers_back:
            yield delayed(order, order.index[layer - wait.layers_back, wait.launch])


def refuses(program: CpuProgram, order: list[int]) -> bool:
    try:
        run(program, order)
    except StaleRead:
        return True
    return False
