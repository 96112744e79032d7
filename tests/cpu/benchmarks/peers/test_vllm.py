"""vLLM's arm of the offline benchmark, on a stand-in for vLLM."""

import json
import os

import pytest
import torch
from support.places import DEMO_MODEL, ROOT

from benchmarks.peers import vllm as peer
from nanoflow_backend.config.error import ConfigError

STAND_IN = ROOT / "tests" / "support" / "simulated" / "vllm_package"


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.syspath_prepend(STAND_IN)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    import vllm

    yield vllm
    monkeypatch.delitem(__import__("sys").modules, "vllm")


def test_weights_have_the_same_distribution_in_both_precisions(stand_in):
    for quantization in (None, "fp8"):
        model = stand_in.made(quantization)
        assert peer.draw_weights(model) == pytest.approx(0.02, rel=0.02)
        scale = model.weight_scale if quantization else 1.0
        weight = model.weight.float() * scale
        assert weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert weight.mean().item() == pytest.approx(0, abs=5e-4)
        assert (model.input_layernorm == 1).all()


def test_weights_whose_values_cannot_be_told_are_named(stand_in):
    model = stand_in.made(None)
    model.packed = torch.nn.Parameter(torch.zeros(4, dtype=torch.int32), requires_grad=False)
    with pytest.raises(ConfigError, match=r"vLLM's packed: expected a floating dtype, got torch\.int32"):
        peer.draw_weights(model)


def test_several_workloads_run_in_one_start(stand_in, tmp_path):
    trace, output = tmp_path / "trace.csv", tmp_path / "r.json"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        + "".join(f"2024-01-01 00:00:00,{n},{3 * n}\n" for n in (5, 2000, 7))  # of 2,048 positions
    )
    peer.main(DEMO_MODEL, output, workload=["8/3:4", f"{trace}:9"], quantization="fp8", kv_cache_dtype="fp8")
    found = json.loads(output.read_text())
    first, second = found["runs"]
    assert (first["workload"], first["requests"], first["input_tokens"], first["output_tokens"]) == ("8/3", 4, 32, 12)
    assert (second["workload"], second["requests"], second["input_tokens"]) == ("trace", 2, 12)
    assert second["trace_rows_too_long"] == 1
    assert first["total_tokens_per_s"] == pytest.approx(44 / first["wall_s"], rel=0.06)  # given in ms
    assert (found["quantization"], found["kv_cache_dtype"]) == ("fp8", "fp8")
    assert found["settings"]["max_model_len"] == 2048
    assert "requests" not in found


def test_one_workload_is_the_result_itself(stand_in, tmp_path):
    output = tmp_path / "r.json"
    peer.main(DEMO_MODEL, output, input_tokens=8, output_tokens=3, requests=4)
    found = json.loads(output.read_text())
    assert (found["workload"], found["requests"], found["quantization"]) == ("8/3", 4, None)
    assert "runs" not in found
