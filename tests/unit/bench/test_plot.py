"""The plot of an offline run: its curves by hand-made counts, and a picture that has them."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from nanoflow_backend.bench.plot import bench_plot, utilisation
from nanoflow_backend.config.error import ConfigError

POINT = {
    "at_s": 2.0,
    "wall_s": 2.0,
    "steps": 10,
    "prefill_tokens": 700,
    "decode_tokens": 300,
    "sampled_rows": 310,
    "kv_tokens_read": 5000,
    "attended_pairs": 9000,
    "power_w": 630,
}
RESULT = {
    "model": "m",
    "workload": "1/1",
    "schedule": "sequential",
    "device": "a device",
    "total_tokens_per_s": 500.0,
    "gpu_power_limit_w": 700.0,
    "gemm": {"per_s": 1e6},
    "memory": {"per_s": 1e5},
    "work": {
        "linear_flop_per_token": 1000,
        "head_flop_per_row": 100,
        "attention_flop_per_pair": 10,
        "weight_bytes": 4000,
        "kv_bytes_per_token": 8,
    },
    "steady": "too short",
    "timeline": [POINT, {**POINT, "at_s": 3.0, "wall_s": 1.0}],
}


def test_use_is_what_was_counted_over_what_was_measured():
    whole, half = utilisation(RESULT)
    assert (whole.start_s, whole.end_s) == (0.0, 2.0)
    assert whole.compute == pytest.approx((1000 * 1000 + 310 * 100 + 9000 * 10) / 2e6)
    assert whole.memory == pytest.approx((10 * 4000 + 5000 * 8) / 2e5)
    assert whole.power == pytest.approx(0.9)
    assert half.compute == pytest.approx(2 * whole.compute), "the same in half the time"


def test_products_in_fp8_are_counted_at_their_own_rate():
    work = {**RESULT["work"], "fp8_flop_per_token": 600}
    whole, _ = utilisation({**RESULT, "work": work, "gemm_fp8": {"per_s": 3e6}})
    rest = 1000 * 400 + 310 * 100 + 9000 * 10
    assert whole.compute == pytest.approx((rest / 1e6 + 1000 * 600 / 3e6) / 2)


def test_a_result_of_several_workloads_has_no_picture(tmp_path):
    run = tmp_path / "run.json"
    run.write_text(json.dumps({"runs": [RESULT, RESULT]}))
    with pytest.raises(ConfigError, match="expected a result of one workload, got 2"):
        bench_plot([run], tmp_path / "run.svg")


def test_the_picture_names_its_curves(tmp_path):
    run, picture = tmp_path / "run.json", tmp_path / "run.svg"
    steady = {"from_s": 1.0, "wall_s": 1.0}
    run.write_text(json.dumps({**RESULT, "steady": steady}))
    bench_plot([run], picture)
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")
    for name in ("compute", "memory bandwidth", "power", "stationary"):
        assert f"<!-- {name} -->" in picture.read_text()


def test_the_picture_of_an_emulated_run_says_so(tmp_path):
    run, picture = tmp_path / "run.json", tmp_path / "run.svg"
    for emulated in ({}, {"emulated": {"ranks": 8, "network": "NCCL"}}):
        run.write_text(json.dumps({**RESULT, **emulated}))
        bench_plot([run], picture)
        assert ("EMULATED: rank 0 of 8 alone, network NCCL" in picture.read_text()) == bool(emulated)


@pytest.mark.parametrize("text", ["{", '{"timeline": []}', "[]"])
def test_what_is_no_result_is_named(tmp_path, text):
    run = tmp_path / "run.json"
    run.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.json: expected a result of nanoflow bench offline"):
        bench_plot([run], tmp_path / "run.svg")
