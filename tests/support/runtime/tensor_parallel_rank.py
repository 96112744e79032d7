"""One rank of a tensor-parallel program, to be run in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from msgspec.structs import replace
from nanoflow_kernels import reference
from support.collectives.checks import TOLERANCE, check_collectives
from support.models.batches import Chunk, Requests, forward
from torch import Tensor

from nanoflow_backend.config.precision import FLOAT32
from nanoflow_backend.graph.collectives import split_all_reduce
from nanoflow_backend.graph.operation import Graph
from nanoflow_backend.models import weights
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.runtime.binding import Binding
from nanoflow_backend.runtime.collectives.gloo import Gloo
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
    collectives = Gloo()
    for dtype in TOLERANCE:
        for tokens in (0, 1, 3, 8):
            for num_sms in (None, 5):
                check_collectives(collectives, tokens, dtype, num_sms)
    results: dict[tuple[str, str], Tensor] = {}
    for folder in work.checkpoints:
        config = read_model_config(folder)
        model = build(config, work.ranks)
        loaded = weights.load(folder, config, model, rank=rank, tp=work.ranks)
        requests = Requests(config, work.lengths)
        for name, schedule in schedules(model.layer, work.tokens, work.ranks).items():
            pages = requests.empty_pages(work.ranks)
            options = {"max_tokens": work.tokens, "precision": FLOAT32}
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
