"""The whole engine on models in FP8: checkpoints, weights that are quantised as they are loaded, random ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.models.fp8_checkpoints import FOLDER, changed, tensors
from torch import Tensor

from benchmarks.models import checkpoints
from nanoflow_backend.engine import LLM, SamplingParams

PROMPT = [(7 * i * i + 3 * i) % 331 for i in range(60)]


def held(llm: LLM) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of a weight and of the pages."""
    binding = llm.engine.executor.worker.program.binding
    return binding.weights["layers.0.gate_up.weight"].dtype, binding.kv.dtype


def scored(llm: LLM, prompt: list[int]) -> Tensor:
    """The log-probabilities of the prompt's tokens but the first."""
    (completion,) = llm.generate([prompt], SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0))
    return torch.tensor([token.logprobs[0] for token in completion.prompt_logprobs])[-len(prompt) + 1 :]


@pytest.mark.parametrize(
    ("name", "in_fp8"), [("ct_tensor_static_kv", True), ("modelopt_experts", True), ("fp8_block", False)]
)
def test_a_checkpoint_in_fp8_needs_no_word(name: str, in_fp8: bool) -> None:
    asked = load_file(FOLDER / name / "expected.safetensors")
    ids = asked["token_ids"].long()
    llm = LLM.from_pretrained(FOLDER / name, kv_cache_tokens=512, chunk_tokens=24)
    assert held(llm) == (torch.float8_e4m3fn, torch.float8_e4m3fn if in_fp8 else torch.float32)
    expected = asked["logits"].log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
    assert torch.allclose(scored(llm, ids.tolist()), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("fields", [{}, {"kv_cache_dtype": "fp8_e4m3"}])
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_a_checkpoint_is_quantised_as_it_is_loaded(architecture: str, fields: dict[str, Any], tmp_path: Path) -> None:
    checkpoints.save(checkpoints.make(architecture), tmp_path)
    exact = scored(LLM.from_pretrained(tmp_path, kv_cache_tokens=512), PROMPT)
    llm = LLM.from_pretrained(tmp_path, kv_cache_tokens=512, quantization="fp8", **fields)
    assert held(llm) == (torch.float8_e4m3fn, torch.float8_e4m3fn if fields else torch.float32)
    assert 0.01 < (scored(llm, PROMPT) - exact).abs().mean() < 0.3 * exact.std()


def test_a_checkpoint_with_scales_for_pages_alone_can_be_quantised_as_it_is_loaded(tmp_path: Path) -> None:
    """compressed-tensors without a config group: weights are as they were."""
    name = "ct_tensor_static_kv"
    state: dict[str, Tensor | None] = dict.fromkeys(
        t for t in tensors(name) if t.endswith(("weight_scale", "input_scale"))
    )
    state |= {t: weight.bfloat16() / 448 for t, weight in tensors(name).items() if weight.dtype == torch.float8_e4m3fn}
    folder = changed(name, tmp_path, state, {"config_groups": {}})
    llms = [LLM.from_pretrained(folder, kv_cache_tokens=512, quantization=q) for q in (None, "fp8")]
    assert [held(llm) for llm in llms] == [
        (dtype, torch.float8_e4m3fn) for dtype in (torch.float32, torch.float8_e4m3fn)
    ]
    assert all(llm.engine.executor.worker.program.binding.weights["layers.0.kv.scales"].max() < 1 for llm in llms)


def test_random_weights_in_fp8(tmp_path: Path) -> None:
    checkpoints.save(checkpoints.make("llama"), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    llm = LLM.from_pretrained(tmp_path, kv_cache_tokens=512, quantization="fp8", load_format="dummy")
    assert held(llm)[0] == torch.float8_e4m3fn
    assert scored(llm, PROMPT).isfinite().all()
