"""The engine computes what transformers computes, however it is scheduled, cut, batched, cached and sharded.

Here rows that meet every pair of choices; `make parity` runs the full product.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.pairwise import pairwise_rows

from benchmarks.accuracy.against_transformers import MODELS, OUTPUT_TOKENS, RUNS, checkpoint, prompts, run
from benchmarks.models.checkpoints import CONFIGS
from nanoflow_backend.engine import LLM, SamplingParams

ROWS = pairwise_rows({**MODELS, **RUNS}, seed=6)  # twelve: there are as many pairs of architecture and ratio


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(str(value) for value in row.values()))
def test_engine_is_transformers(row: dict[str, Any], folder: Path) -> None:
    outcome = run({name: row[name] for name in MODELS}, {name: row[name] for name in RUNS}, folder)
    assert not outcome.failures
    assert outcome.rows == (1 + row["requests"]) * OUTPUT_TOKENS
    assert outcome.excused_rows <= outcome.rows // 10, "most rows must have been compared"
    assert (outcome.cached_tokens > 0) == row["prefix_caching"]
    if row["schedule"] != "sequential":
        assert outcome.split_steps >= 0.9 * outcome.steps, "nano-batched steps with two or more nano-batches"
        assert outcome.split_chunks > 0 or row["chunk_tokens"] == 1, "a boundary inside one request's chunk"


@pytest.mark.parametrize("architecture", CONFIGS)
def test_greedy_tokens_are_those_of_generate(architecture: str, folder: Path) -> None:
    model, path = checkpoint(folder, architecture, 4, 16, architecture != "phi3", False)
    prompt = prompts(model.config.vocab_size)[0]
    ids = torch.tensor([prompt])
    theirs = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=OUTPUT_TOKENS,
        min_new_tokens=OUTPUT_TOKENS,
    )
    llm = LLM.from_pretrained(path, schedule="nano-batched-3", chunk_tokens=20)
    params = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    assert llm.generate([prompt], params)[0].token_ids == theirs[0, len(prompt) :].tolist()


def test_the_rows_meet_every_pair_of_choices() -> None:
    factors = {**MODELS, **RUNS}
    for a in factors:
        for b in factors:
            met = {(row[a], row[b]) for row in ROWS}
            assert a == b or met == {(x, y) for x in factors[a] for y in factors[b]}
