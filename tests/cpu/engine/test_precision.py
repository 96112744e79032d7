"""Weights, activations and KV pages in dtypes of their own, and what was made for another precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.schedule import schedules

from benchmarks.models import checkpoints
from nanoflow_backend.config.precision import BFLOAT16, FLOAT32
from nanoflow_backend.engine import LLM, SamplingParams
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.schedule.plan import ScheduleError
from nanoflow_backend.schedule.presets import sequential

PROMPT = [(7 * i * i + 3 * i) % 331 for i in range(60)]
ROUNDING = 0.1  # of a log-probability, that 8 bits of mantissa may cost


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save(checkpoints.make("llama"), tmp_path_factory.mktemp("model"))


def scored(llm: LLM) -> list[float]:
    """The log-probabilities of PROMPT's tokens."""
    (completion,) = llm.generate([PROMPT], SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0))
    return [token.logprobs[0] for token in completion.prompt_logprobs]


def test_pages_have_a_dtype_of_their_own(model: Path) -> None:
    exact = scored(LLM.from_pretrained(model, kv_cache_tokens=512))
    llm = LLM.from_pretrained(model, kv_cache_tokens=512, kv_cache_dtype="bfloat16", chunk_tokens=8)
    binding = llm.engine.executor.worker.program.binding
    assert binding.kv.dtype is torch.bfloat16
    assert {buffer.dtype for buffer in binding.buffers} == {torch.float32}
    assert binding.weights["layers.0.qkv.weight"].dtype is torch.float32
    worst = max(abs(a - b) for a, b in zip(exact, scored(llm), strict=True))
    assert 1e-5 < worst < ROUNDING


def test_one_dtype_fills_all_roles(model: Path) -> None:
    llm = LLM.from_pretrained(model, kv_cache_tokens=512, dtype="bfloat16")
    binding = llm.engine.executor.worker.program.binding
    held = (binding.kv, *binding.buffers, binding.weights["layers.0.qkv.weight"])
    assert {tensor.dtype for tensor in held} == {torch.bfloat16}
    assert binding.weights["layers.0.rope.frequencies"].dtype is torch.float32


@pytest.mark.parametrize("fields", [{}, {"dtype": "float16"}, {"kv_cache_dtype": "bfloat16"}])
def test_a_schedule_of_another_precision_is_refused(model: Path, fields: dict[str, str], tmp_path: Path) -> None:
    built = build(read_model_config(model))
    other = schedules.save(tmp_path / "plan.json", built, sequential(built.layer, 64), precision=BFLOAT16)
    with pytest.raises(ScheduleError, match=r"plan\.json: .*precision is bfloat16 in the file and .*float\d+.* here"):
        LLM.from_pretrained(model, schedule=other, kv_cache_tokens=512, **fields)


def test_a_schedule_of_the_same_precision_is_taken(model: Path, tmp_path: Path) -> None:
    built = build(read_model_config(model))
    for precision in (FLOAT32, BFLOAT16):
        path = schedules.save(tmp_path / "plan.json", built, sequential(built.layer, 64), precision=precision)
        llm = LLM.from_pretrained(model, schedule=path, kv_cache_tokens=512, dtype=str(precision))
        assert llm.engine.config.dense_batch_tokens == 64
