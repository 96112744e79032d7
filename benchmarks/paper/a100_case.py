"""A case is a batch on A100-like tables to plan for; a setting is what is known of it, and where searches start."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from nanoflow_search.cost.workload import MeanWorkload
from nanoflow_search.plan.op_graph import layer_problem
from nanoflow_search.plan.problem import NanoTask, Problem
from nanoflow_search.predict.predict import predict
from nanoflow_search.predict.timing_model import TimingModel

from benchmarks.paper import a100_tables as a100
from benchmarks.paper.fluid import Fluid
from benchmarks.paper.piece import Piece, Pieces
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import Model, build
from nanoflow_backend.schedule.presets import sequential

MODELS = Path(__file__).parents[1] / "models"
CASES = {  # model, ranks, times, tokens, tokens of a chunk
    "70b": ("llama-2-70b", 8, a100.LLAMA_2_70B_TP8, 2048, 256),
    "8b": ("llama-3-8b", 1, a100.LLAMA_3_8B, 1024, 128),
}
TILE = 128  # tokens: what annealing cuts at multiples of
TENTHS = tuple(round(tenth * a100.SMS / 10) for tenth in range(1, 11))
# The pipeline that the paper's authors found for 2,048 tokens: where each task is cut, in tokens.
PIPELINE = {
    "qkv": (256, 640, 1280),
    "attention": (256, 512, 1024),
    "o": (640,),
    "attention_reduce": (640,),
    "gate_up": (640,),
    "mlp_reduce": (640, 1280),
}


class Setting(NamedTuple):
    """What is known of a case."""

    model: Model
    measured: TimingModel
    tokens: int
    chunk_tokens: int
    coarse: Problem  # that the two stages solve
    fine: Problem  # that annealing solves
    sequential_us: float  # by the published times, whatever is spared


class Case(NamedTuple):
    """A batch to plan for."""

    name: str
    tables: str
    workload: str
    spare: str | None


@cache
def setting(case: Case) -> Setting:
    folder, ranks, times_us, tokens, chunk_tokens = CASES[case.name]
    model = build(read_model_config(MODELS / folder), ranks)
    performance = {"published": a100.PUBLISHED, "release": a100.RELEASE}[case.tables]
    mix = MeanWorkload.parse(case.workload).mix(tokens)
    published = a100.Published(a100.profile(model.layer, ranks, times_us, performance), mix)
    spared = spared_us(times_us, case.spare) if case.spare else times_us
    measured = a100.Published(a100.profile(model.layer, ranks, spared, performance), mix)
    coarse, fine = (layer_problem(model.layer, ranks, tokens, t, measured.operations_us) for t in (chunk_tokens, TILE))
    sequential_us = predict(sequential(model.layer, tokens), published, model.num_layers).layer_us
    return Setting(model, measured, tokens, chunk_tokens, coarse, fine, sequential_us)


def spared_us(times_us: dict[str, dict[int, float]], name: str) -> dict[str, dict[int, float]]:
    """Return times with which three launches of an operation cost as much as two do."""
    third_us = a100.line(times_us[name], 0) / 3
    return times_us | {name: {tokens: us - third_us for tokens, us in times_us[name].items()}}


def fluid_of(at: Setting) -> Fluid:
    return Fluid(at.fine, at.measured, TILE)


def gain(at: Setting, us: float) -> float:
    return round(at.sequential_us / us, 4)


# where a search starts


def released(problem: Problem, pieces: Pieces) -> Pieces:
    """Return the pieces with GEMMs that have no limit of SMs, and keep what the others leave; the others have one."""
    return tuple(p._replace(sms=None if problem[p.nano.task].lane == "compute" else p.sms or a100.SMS) for p in pieces)


def pipeline(at: Setting) -> Pieces:
    """Return the authors' own plan, task after task: attention with R = 0.4, collectives with 0.2, decodes first."""
    found = []
    for task in at.fine.tasks:
        sms = {"compute": None, "memory": TENTHS[3], "network": TENTHS[1]}[task.lane]
        for start, stop in pairwise((0, *PIPELINE[task.name], at.tokens)):
            decodes = round(at.measured.decodes(start, stop)) if task.lane == "memory" else 0
            found.append(Piece(NanoTask(task.name, start // TILE, stop // TILE), 0, sms, decodes))
    return tuple(found)
