"""One rank of a tensor-parallel program, to be run in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from batches import Chunk, Requests, forward
from msgspec.structs import replace
from nanoflow_kernels import reference
from torch import Tensor

from nanoflow_backend.config import ModelConfig
from nanoflow_backend.graph.collectives import split_all_reduce
from nanoflow_backend.graph.operation import Graph
from nanoflow_backend.models import weights
from nanoflow_backend.models.model import build
from nanoflow_backend.runtime.binding import Binding
from nanoflow_backend.runtime.collectives import Collectives
from nanoflow_backend.runtime.cpu import CpuProgram
from nanoflow_backend.schedule.plan import Schedule
from nanoflow_backend.schedule.presets import nano_batched, sequential


class Work(NamedTuple):
    """Checkpoints to run, the same batches on each; `rendezvous` and `results` are files."""

    checkpoints: list[Path]
    lengths: list[int]
    batches: list[list[Chunk]]
    tokens: int
    ranks: int
    rendezvous: Path
    results: Path


def schedules(graph: Graph, tokens: int, tp: int) -> dict[str, Schedule]:
    reduces = ("attention_reduce", "mlp_reduce")
    split = nano_batched(split_all_reduce(graph, reduces, tp), tokens, 2)
    return {
        "sequential": sequential(graph, tokens),
        "nano-batched": nano_batched(graph, tokens, 3),
        "split": replace(split, split_all_reduces=reduces),
    }


def run(rank: int, work: Work) -> None:
    """Join the others; check the collectives; let rank 0 save {(checkpoint, schedule): logits of all batches}."""
    dist.init_process_group("gloo", init_method=f"file://{work.rendezvous}", rank=rank, world_size=work.ranks)
    check_collectives(rank, work.ranks)
    results: dict[tuple[str, str], Tensor] = {}
    for folder in work.checkpoints:
        config = ModelConfig.from_pretrained(folder)
        model = build(config, work.ranks)
        loaded = weights.load(folder, config, model, rank=rank, tp=work.ranks)
        requests = Requests(config, work.lengths)
        for name, schedule in schedules(model.layer, work.tokens, work.ranks).items():
            pages = requests.empty_pages(work.ranks)
            collectives = Collectives(work.ranks)
            options = {"max_tokens": work.tokens, "dtype": torch.float32}
            binding = Binding(model, [schedule], loaded, pages, collectives, reference, **options)
            program = CpuProgram(binding, checked=True)
            logits = []
            for batch in work.batches:
                forward(program, requests.inputs(batch))
                logits.append(program.head(torch.arange(program.plan.tokens)))
            results[folder.name, name] = torch.cat(logits)
    if rank == 0:
        torch.save(results, work.results)
    dist.barrier()
    dist.destroy_process_group()


def check_collectives(rank: int, ranks: int) -> None:
    """The kernels on columns of wider rows, and on no rows at all."""
    collectives = Collectives(ranks)
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (3, 0):
            whole = torch.arange(tokens * 4 * ranks, dtype=dtype).view(tokens, 4 * ranks)
            mine = (whole * (rank + 1))[:, : 2 * ranks]  # a strided input
            total = (whole * sum(range(1, ranks + 1)))[:, : 2 * ranks]
            wide = torch.full((3, tokens, 11), torch.nan, dtype=dtype)
            collectives.all_reduce(mine, out=wide[0, :, : 2 * ranks])
            assert torch.equal(wide[0, :, : 2 * ranks], total)
            collectives.reduce_scatter(mine, out=wide[1, :, :2])
            assert torch.equal(wide[1, :, :2], total[:, 2 * rank : 2 * rank + 2])
            collectives.all_gather(wide[1, :, :2], out=wide[2, :, : 2 * ranks])
            assert torch.equal(wide[2, :, : 2 * ranks], total)
            assert wide[:, :, 2 * ranks :].isnan().all()  # and nothing beside their columns
