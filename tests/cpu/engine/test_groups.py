"""Batches whose decodes are dealt out to groups, through the engine: the same tokens as all decodes first."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from support.schedule.schedules import save

from benchmarks.models import checkpoints
from nanoflow_backend.engine import LLM, SamplingParams
from nanoflow_backend.engine.completion import Completion
from nanoflow_backend.engine.worker import Worker
from nanoflow_backend.graph.operation import Graph
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.schedule.plan import Group, Schedule
from nanoflow_backend.schedule.presets import overlapped, sequential, synchronise
from nanoflow_backend.scheduler.batch import Batch

TOKENS = 64
PLANS = ("halves", "all decodes last", "grains", "groups of their own", "one lane")
ASKED = [
    SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, prompt_logprobs=2 if number % 3 == 0 else None)
    for number in range(20)
]


@pytest.fixture(scope="module", params=checkpoints.OWN_GRAPHS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp(request.param)
    checkpoints.save(checkpoints.make(request.param), folder)
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[Completion]:
    return LLM.from_pretrained(folder, dense_batch_tokens=TOKENS).generate(prompts(folder), ASKED)


def prompts(folder: Path) -> list[list[int]]:
    vocab_size, rng = read_model_config(folder).vocab_size, random.Random(3)
    return [[rng.randrange(vocab_size) for _ in range(rng.randint(1, 70))] for _ in ASKED]


def plan(layer: Graph, name: str) -> Schedule:
    halves = overlapped(layer, TOKENS, 32, 0.5, 40, 132)
    return {
        "halves": halves,
        "all decodes last": overlapped(layer, TOKENS, 24, 0.0, 40, 132),
        "grains": overlapped(layer, TOKENS, 16, 0.9, 40, 132, granularity=16),
        "groups of their own": synchronise(
            replace(halves, groups=(Group(5, 0.1), Group(31, 0.3), Group(40, 0.3), Group(TOKENS, 0.3))), layer
        ),
        "one lane": replace(sequential(layer, TOKENS), groups=(Group(20, 0.3), Group(TOKENS, 0.7))),
    }[name]


def comparable(completions: list[Completion]) -> list[Any]:
    return [
        (c.token_ids, [(entry.token_ids, entry.sampled_rank) for entry in c.prompt_logprobs or ()]) for c in completions
    ]


@pytest.mark.parametrize("name", PLANS)
def test_groups_change_no_token(
    folder: Path, expected: list[Completion], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = watch(monkeypatch)
    model = build(read_model_config(folder))
    path = save(tmp_path / "plan.json", model, plan(model.layer, name))
    llm = LLM.from_pretrained(folder, schedule=path, dense_batch_tokens=TOKENS, chunk_tokens=30, page_tokens=4)
    found = llm.generate(prompts(folder), ASKED)
    assert comparable(found) == comparable(expected)
    for ours, theirs in zip(found, expected, strict=True):
        logprobs = [torch.tensor([entry.logprobs for entry in c.prompt_logprobs or ()]) for c in (ours, theirs)]
        torch.testing.assert_close(*logprobs, rtol=0, atol=1e-4)
    assert len(cut) > 3, "chunks that lie in several pieces"


def watch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The slots, as batches come, whose chunk lies in several pieces with other rows between them."""
    cut: list[int] = []
    launch = Worker.launch_forward

    def launch_forward(worker: Worker, batch: Batch) -> Any:
        launched = launch(worker, batch)
        if launched.inputs.layout:
            first = len(batch.decode_slots)
            for prefill in batch.prefills:
                rows = launched.inputs.layout.place[first : first + len(prefill.token_ids)]
                if rows[-1] - rows[0] >= len(rows):
                    cut.append(prefill.slot)
                first += len(rows)
        return launched

    monkeypatch.setattr(Worker, "launch_forward", launch_forward)
    return cut
