"""The breakdown of a step, on made-up kernels: the device is only where their times come from."""

import pytest

from nanoflow_backend.bench.breakdown import Kernel, product_operations, summarise
from nanoflow_backend.engine import Engine

STEPS = 3


def kernels(per_product: int = 1) -> list[Kernel]:
    """Steps of qkv, attention, o and the head one after the other, with 10 us of nothing before the head."""
    found, at = [], 0.0
    for _ in range(STEPS):
        for name, duration_us, gap_us in (
            ("nvjet_sm90_a", 30.0, 0.0),
            ("_decode", 50.0, 0.0),
            ("_merge", 2.0, 0.0),
            ("nvjet_sm90_a", 8.0, 0.0),
            ("Memset (Device)", 4.0, -4.0),  # beside the product: busy once
            ("_gemm_persistent", 6.0, 10.0),
        ):
            at += gap_us
            for _ in range(per_product if "nvjet" in name or "gemm" in name else 1):
                found.append(Kernel(at, at + duration_us, name))
                at += duration_us
    return sorted(found)


def test_time_goes_to_operations_by_the_order_of_launches():
    found = summarise(kernels(), STEPS, ["qkv", "o", "lm_head"])
    assert found["operations_ms_per_step"] == {
        "attention of decodes": 0.052,
        "qkv": 0.03,
        "o": 0.008,
        "lm_head": 0.006,
        "the rest": 0.004,
    }
    assert found["step_ms"] == pytest.approx(0.106, abs=1e-3)
    assert found["idle_share"] == pytest.approx(30 / 318, abs=1e-5)
    assert [row["kernel"] for row in found["kernels"]][:2] == ["_decode", "nvjet_sm90_a"]
    assert found["kernels"][1]["per_step"] == 2


def test_products_of_several_kernels_are_not_told_apart():
    found = summarise(kernels(per_product=2), STEPS, ["qkv", "o", "lm_head"])
    assert found["operations_ms_per_step"]["linear"] == pytest.approx(2 * 0.044)
    assert "qkv" not in found["operations_ms_per_step"]


@pytest.mark.parametrize("schedule", ["sequential", "nano-batched-2"])
def test_the_launches_of_a_step_are_named(schedule):
    engine = Engine.from_pretrained("demo/tiny-llama", schedule=schedule, kv_cache_tokens=1024)
    parts = 1 if schedule == "sequential" else 2
    names = product_operations(engine)
    assert names[-1] == "lm_head"
    layers = engine.model_config.num_layers
    assert sorted(names[:-1]) == sorted(["qkv", "o", "gate_up", "down"] * layers * parts)
