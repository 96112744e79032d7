"""The picture of open loops: its lines are the results' figures, and it names them."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from nanoflow_backend.bench.online.rates_plot import PANELS, curve
from nanoflow_backend.bench.plot import bench_plot
from nanoflow_backend.config.error import ConfigError


def times(scale):
    return {"mean": scale, "p50": scale, "p90": 2 * scale, "p99": 3 * scale}


def result(engine, scale, goodput=True, **changes):
    rates = [
        {
            "rate": rate,
            "first_token_ms": times(scale * rate),
            "between_tokens_ms": times(2 * scale * rate),
            "normalized_latency_ms": times(3 * scale * rate),
            **({"goodput_per_s": rate / 2} if goodput else {}),
        }
        for rate in (8.0, 2.0, 4.0)
    ]
    return {"engine": engine, "model": "m", "workload": "9/9", "device": "a device", "rates": rates, **changes}


@pytest.fixture
def drawn(tmp_path):
    def draw(*results):
        runs = [tmp_path / f"run_{number}.json" for number in range(len(results))]
        for run, found in zip(runs, results, strict=True):
            run.write_text(json.dumps(found))
        bench_plot(runs, tmp_path / "picture.svg")
        return (tmp_path / "picture.svg").read_text()

    return draw


def test_a_line_has_the_figures_by_rate():
    first, _, normalized, goodput = PANELS
    found = result("a", 1.0)
    assert curve(found, first, "p99") == ([2.0, 4.0, 8.0], [6.0, 12.0, 24.0])
    assert curve(found, normalized, "mean") == ([2.0, 4.0, 8.0], [6.0, 12.0, 24.0])
    assert curve(found, goodput, None) == ([2.0, 4.0, 8.0], [1.0, 2.0, 4.0])
    del found["rates"][0]["first_token_ms"]["p99"]  # no request of this rate had a token
    assert curve(found, first, "p99") == ([2.0, 4.0], [6.0, 12.0])


def test_the_picture_names_engines_and_figures(drawn):
    picture = drawn(result("nanoflow", 1.0), result("vllm", 2.0))
    assert ElementTree.fromstring(picture).tag.endswith("svg")
    for name in ("nanoflow, p50", "vllm, p99", "first token, ms", "goodput, requests/s", "m, 9/9 tokens, on a device"):
        assert f"<!-- {name} -->" in picture
    assert "goodput" not in drawn(result("nanoflow", 1.0, goodput=False))


def test_results_of_one_engine_are_named_by_their_files(drawn):
    picture = drawn(result("nanoflow", 1.0), result("nanoflow", 2.0))
    assert "<!-- run_0, p50 -->" in picture
    assert "<!-- run_1, p50 -->" in picture


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ((result("a", 1.0), result("b", 1.0, workload="1/1")), "expected results of one workload, got 1/1, 9/9"),
        ((result("a", 1.0), {"timeline": []}), r"run_1\.json: expected one result of nanoflow bench offline, or some"),
    ],
)
def test_results_that_do_not_go_together_are_named(drawn, results, message):
    with pytest.raises(ConfigError, match=message):
        drawn(*results)
