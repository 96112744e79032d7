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
from nanoflow_backend.graph.collectives import AllReduceForm, Forms, model_in_forms, with_parameters
from nanoflow_backend.graph.model import Model
from nanoflow_backend.models import weights
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.runtime.binding import Binding
from nanoflow_backend.runtime.collectives.gloo import Gloo
from nanoflow_backend.runtime.cpu import CpuProgram
from nanoflow_backend.schedule.plan import Schedule
from nanoflow_backend.schedule.presets import nano_batched, sequential
from nanoflow_backend.schedule.validate import validate


class Work(NamedTuple):
    """Checkpoints to run in some forms, the same batches on each; `rendezvous` and `results` are files."""

    checkpoints: dict[Path, list[str]]  # with the FORMS to run each in
    lengths: list[int]
    batches: list[list[Chunk]]
    tokens: int
    ranks: int
    rendezvous: Path
    results: Path


FORMS: dict[str, Forms] = {
    "whole": {},
    "split": dict.fromkeys(("attention_reduce", "mlp_reduce"), AllReduceForm.SPLIT),
    "gathered": {"attention_reduce": AllReduceForm.GATHERED},
    "gathered and split": {"attention_reduce": AllReduceForm.GATHERED, "mlp_reduce": AllReduceForm.SPLIT},
    "normed": dict.fromkeys(("attention_reduce", "mlp_reduce"), AllReduceForm.NORMED),
}


def schedules(model: Model, names: list[str], tokens: int, tp: int) -> dict[str, Schedule]:
    """Nano-batches in these FORMS of the all-reduces, collectives in a lane of their own; and sequential."""
    found = {"sequential": sequential(model.layer, tokens)}
    for name in names:
        forms = FORMS[name]
        graph = model_in_forms(model, forms, tp).layer
        plan = replace(nano_batched(graph, tokens, 3 if name == "whole" else 2), all_reduces=dict(forms))
        validate(plan, graph, model.num_layers, ranks=tp)
        found[name] = plan
    return found


def run(rank: int, work: Work) -> None:
    """Join the others; check collectives, of two; let rank 0 save {(checkpoint, schedule): logits of all batches}."""
    dist.init_process_group("gloo", init_method=f"file://{work.rendezvous}", rank=rank, world_size=work.ranks)
    collectives = Gloo()
    for dtype in TOLERANCE if work.ranks == 2 else ():
        for tokens in (0, 1, 3, 8):
            for num_sms in (None, 5):
                check_collectives(collectives, tokens, dtype, num_sms)
    results: dict[tuple[str, str], Tensor] = {}
    for folder, names in work.checkpoints.items():
        config = read_model_config(folder)
        model = build(config, work.ranks)
        plans = schedules(model, names, work.tokens, work.ranks)
        held = with_parameters(model, [plan.all_reduces for plan in plans.values()], work.ranks)
        loaded = weights.load(folder, config, held, rank=rank, tp=work.ranks)
        requests = Requests(config, work.lengths)
        for name, schedule in plans.items():
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
