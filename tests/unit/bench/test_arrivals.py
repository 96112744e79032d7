"""Arrivals of an open loop: Poisson's or a trace's, of a seed and a rate alone; and loads that cannot be."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from nanoflow_backend.bench.online.arrivals import Arrivals, Load
from nanoflow_backend.config.error import ConfigError

LOAD = Load(rates=(4.0,), warm_up_s=10.0, duration_s=100.0, lengths=(12, 5))


def test_arrivals_are_poissons():
    """By their law: the mean and the deviation of the gaps are both 1/rate, and one gap says nothing of the next."""
    (arrivals,) = replace(LOAD, rates=(7.0,), duration_s=2000.0).arrivals(8192)
    due_s = arrivals.due_s
    gaps = [b - a for a, b in zip((0.0, *due_s), due_s, strict=False)]
    n, mean = len(gaps), sum(gaps) / len(gaps)
    assert due_s[-1] < 2020.0
    assert mean == pytest.approx(1 / 7, rel=4 / math.sqrt(n))
    assert math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / n) == pytest.approx(1 / 7, rel=6 / math.sqrt(n))
    ordered = sorted(gaps)
    for share in (0.1, 0.5, 0.9, 0.99):
        assert ordered[int(share * n)] == pytest.approx(-math.log(1 - share) / 7, rel=0.12)
    following = sum((a - mean) * (b - mean) for a, b in pairwise(gaps)) / n
    assert abs(following) * 49 < 4 / math.sqrt(n)


def test_arrivals_and_prompts_are_those_of_the_seed_and_rate():
    two = replace(LOAD, rates=(4.0, 8.0))
    again, (slow, fast) = two.arrivals(8192), two.arrivals(8192)
    assert again == [slow, fast]
    assert LOAD.arrivals(8192) == [slow], "whatever other rates there are"
    assert list(slow.prompts(1000)) == list(again[0].prompts(1000))
    assert {tuple(prompt) for prompt in slow.prompts(1000)}.isdisjoint(map(tuple, fast.prompts(1000)))
    (other,) = replace(LOAD, seed=1).arrivals(8192)
    assert set(other.due_s).isdisjoint(slow.due_s)
    assert {len(prompt) for prompt in slow.prompts(1000)} == {12}


def test_those_between_the_warm_ups_are_measured():
    (arrivals,) = LOAD.arrivals(8192)
    inside = [number for number, due_s in enumerate(arrivals.due_s) if 10.0 <= due_s < 110.0]
    assert list(arrivals.measured) == inside
    assert arrivals.due_s[0] < 10.0
    assert 110.0 <= arrivals.due_s[-1] < 120.0


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "some.csv"
    rows = [f"2024-01-01 00:00:{number / 2:09.6f}0,{10 + number},{3 + number % 5}" for number in range(100)]
    rows.insert(4, "2024-01-01 00:00:01.9000000,9000,3")
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
    return path


def test_a_traces_arrivals_come_as_they_are_or_stretched_to_a_rate(trace):
    load = replace(LOAD, rates=(), lengths=trace, kind="trace", warm_up_s=5.0, duration_s=20.0)
    (own,) = load.arrivals(8192)
    assert own.due_s[:4] == (0.0, 0.5, 1.0, 1.5)
    assert own.due_s[-1] == 29.5
    assert own.lengths[:6] == tuple((10 + number, 3 + number % 5) for number in range(6)), (
        "the one too long is left out"
    )
    assert own.facts["trace_rows_too_long"] == 1
    assert own.rate == pytest.approx(100 / 49.5)
    (fast,) = replace(load, rates=(4.0,), duration_s=10.0).arrivals(8192)
    assert fast.due_s[:3] == pytest.approx((0.0, 0.5 * own.rate / 4, own.rate / 4))
    assert len(fast.due_s) == pytest.approx(4 * 20, abs=1)


def test_a_traces_lengths_come_at_a_poisson_rate(trace):
    (arrivals,) = replace(LOAD, rates=(1.0,), lengths=trace, warm_up_s=2.0, duration_s=20.0).arrivals(8192)
    assert set(arrivals.lengths) <= {(10 + number, 3 + number % 5) for number in range(100)}
    assert len(arrivals.lengths) == len(arrivals.due_s)
    assert arrivals.facts == {"trace_rows_dropped": 0, "trace_rows_too_long": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rates": ()}, "--rate: expected requests a second"),
        ({"rates": (0.0,)}, "--rate: expected a number above 0, got 0"),
        ({"rates": (math.inf,)}, "--rate: expected a number above 0, got inf"),
        ({"duration_s": -1.0}, "--duration: expected a number above 0, got -1"),
        ({"warm_up_s": math.nan}, "--warm-up: expected seconds, 0 or more, got nan"),
        ({"kind": "trace"}, "--arrivals trace: expected --trace, the file that has them"),
        (
            {"rates": (0.001,), "duration_s": 0.5, "warm_up_s": 0.0},
            "--duration 0.5: expected time for a request at 0.001",
        ),
    ],
)
def test_bad_loads_are_named(changes, message):
    with pytest.raises(ConfigError) as refused:
        replace(LOAD, **changes).arrivals(8192)
    assert str(refused.value).startswith(message)


def test_a_trace_that_is_too_short_is_named(trace):
    for load, message in (
        (
            replace(LOAD, lengths=trace, rates=(9.0,)),
            r"some\.csv: expected \d+ rows for 120 s at 9 a second, found 100",
        ),
        (
            replace(LOAD, lengths=trace, kind="trace"),
            r"some\.csv: expected 120 s of arrivals .*, at this rate it has 25\.0 s",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            load.arrivals(8192)


def test_arrivals_are_equal_by_value():
    assert Arrivals(1.0, 0.0, 1.0, (0.5,), ((1, 2),), 0) == Arrivals(1.0, 0.0, 1.0, (0.5,), ((1, 2),), 0)
