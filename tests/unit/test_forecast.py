import random

import numpy as np
import pytest

from nanoflow_backend.scheduler.forecast import LengthForecast, ReserveMaxTokens, ReserveNothing, peak_pages


def remaining_of(forecast: LengthForecast, produced: int, max_tokens: int) -> float:
    return float(forecast.remaining(np.array([produced]), np.array([max_tokens]))[0])


def test_before_there_is_data_a_request_runs_to_its_max_tokens() -> None:
    assert remaining_of(LengthForecast(), 30, 100) == 70


@pytest.mark.parametrize("seed", range(5))
def test_remaining_is_the_mean_of_those_that_ran_longer(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randint(1, 60) for _ in range(300)]
    forecast = LengthForecast()
    for length in lengths:
        forecast.record(length)
        remaining_of(forecast, 0, 100)  # tables made on the way do not go stale beyond 3 % of the data
    for length in lengths:
        forecast.record(length)
    for produced in range(80):
        max_tokens = produced + rng.randint(1, 90)
        longer = [length for length in lengths if length > produced] * 2
        mean = (sum(longer) + max_tokens) / (len(longer) + 1)  # one more that runs to the end: the prior
        assert remaining_of(forecast, produced, max_tokens) == pytest.approx(min(mean, max_tokens) - produced)


def test_a_request_that_has_outlived_all_others_runs_to_its_max_tokens() -> None:
    forecast = LengthForecast()
    for length in (3, 5, 8):
        forecast.record(length)
    assert remaining_of(forecast, 8, 50) == 42
    assert remaining_of(forecast, 4000, 4050) == 50


def test_old_lengths_fade() -> None:
    forecast = LengthForecast(window=64)
    for _ in range(1000):
        forecast.record(500)
    for _ in range(1000):
        forecast.record(10)
    assert remaining_of(forecast, 0, 1000) == pytest.approx(10, abs=30)


def test_the_two_extremes() -> None:
    produced, max_tokens = np.array([0, 7]), np.array([10, 8])
    assert ReserveNothing().remaining(produced, max_tokens).tolist() == [0, 0]
    assert ReserveMaxTokens().remaining(produced, max_tokens).tolist() == [10, 1]


@pytest.mark.parametrize("seed", range(20))
def test_peak_is_the_highest_moment_of_a_replay(seed: int) -> None:
    rng = random.Random(seed)
    requests = rng.randint(1, 12)
    held = [rng.randint(0, 50) for _ in range(requests)]
    remaining = [rng.choice((0, 3, rng.randint(0, 40))) for _ in range(requests)]
    page_tokens = rng.choice((1, 4, 16))
    moments = [
        sum((h + t) / page_tokens + 0.5 for h, r in zip(held, remaining, strict=True) if r >= t)
        for t in range(max(remaining) + 1)
    ]
    found = peak_pages(np.array(held), np.array(remaining, float), page_tokens)
    assert found == pytest.approx(max(moments))


def test_nobody_needs_nothing() -> None:
    assert peak_pages(np.array([], np.int64), np.array([]), 16) == 0
