import random
from fractions import Fraction

import numpy as np
import pytest

from nanoflow_backend.bench.reservation import ReserveMaxTokens, ReserveNothing
from nanoflow_backend.scheduler.forecast.length_forecast import LengthForecast


def learned(ended: list[int], running: list[int]) -> LengthForecast:
    forecast = LengthForecast()
    for length in ended:
        forecast.record(length)
    forecast.update(np.array(running, np.int64))
    return forecast


def estimated(forecast: LengthForecast, produced: int, max_tokens: int, ahead: int) -> float:
    return float(forecast.survival(np.array([produced]), np.array([max_tokens]), np.array([0, ahead]))[-1, 0])


def survival(ended: list[int], running: list[int], produced: int, length: int) -> Fraction:
    """P(L >= length | L > produced) by the definition: at each length on the way, who stays of those that came?"""
    stay = Fraction(1)
    for at in range(produced + 1, length):
        came = sum(n >= at for n in ended) + sum(n >= at for n in running) + 1
        stay *= 1 - Fraction(ended.count(at), came)
    return stay


def test_before_there_is_data_a_request_runs_to_its_max_tokens() -> None:
    assert estimated(learned([], []), 30, 100, 70) == 1
    assert estimated(learned([], []), 30, 100, 71) == 0


def test_what_is_forgotten_was_never_learned() -> None:
    forecast = learned([3, 3, 5], [2])
    assert estimated(forecast, 2, 100, 50) < 1
    forecast.forget()
    assert estimated(forecast, 2, 100, 50) == 1


@pytest.mark.parametrize("seed", range(5))
def test_survival_is_counted_from_those_that_came_as_far(seed: int) -> None:
    rng = random.Random(seed)
    ended = [rng.randint(1, 40) for _ in range(60)]
    running = [rng.randint(0, 50) for _ in range(rng.choice((0, 30)))]
    forecast = learned(ended, running)
    for _ in range(200):
        produced, ahead = rng.randint(0, 60), rng.randint(0, 60)
        max_tokens = produced + rng.randint(0, 70)
        beyond = produced + ahead > max_tokens
        expected = 0 if beyond else survival(ended, running, produced, produced + ahead)
        assert estimated(forecast, produced, max_tokens, ahead) == pytest.approx(float(expected))


def test_the_sum_over_all_moments_is_the_expected_rest() -> None:
    rng = random.Random(0)
    ended = [rng.randint(1, 60) for _ in range(3000)]
    forecast = learned(ended, [])
    for produced in (0, 10, 35, 50):
        longer = [length for length in ended if length > produced]
        moments = np.arange(200)
        rest = forecast.survival(np.array([produced]), np.array([produced + 199]), moments)[1:].sum()
        never_ending = 199 / (len(longer) + 1)  # the prior's share
        assert rest == pytest.approx(np.mean(longer) - produced + never_ending, rel=0.05)


def test_a_request_that_has_outlived_all_others_runs_to_its_max_tokens() -> None:
    forecast = learned([3, 5, 8], [])
    assert estimated(forecast, 8, 50, 42) == 1
    assert estimated(forecast, 4000, 4050, 50) == 1


def test_the_running_correct_for_the_short_ones_ending_first() -> None:
    alone = learned([5, 6, 7], [])
    among_many = learned([5, 6, 7], [20] * 97)
    assert estimated(alone, 0, 100, 10) == pytest.approx(1 / 4)
    assert estimated(among_many, 0, 100, 10) > 0.96


def test_old_lengths_fade() -> None:
    forecast = LengthForecast(window=64)
    for length in [500] * 1000 + [10] * 1000:
        forecast.record(length)
    forecast.update(np.array([], np.int64))
    assert estimated(forecast, 0, 1000, 11) < 0.05


def test_a_few_more_records_wait_for_the_next_table() -> None:
    forecast = learned([10] * 320, [])
    before = estimated(forecast, 0, 100, 8)
    for _ in range(20):
        forecast.record(5)
        forecast.update(np.array([], np.int64))
    assert estimated(forecast, 0, 100, 8) == pytest.approx(before, abs=0.06)
    assert estimated(forecast, 0, 100, 8) < before


def test_the_two_extremes() -> None:
    produced, max_tokens, ahead = np.array([0, 7]), np.array([10, 8]), np.array([0, 1, 2, 11])
    assert ReserveNothing().survival(produced, max_tokens, ahead).T.tolist() == [[1, 0, 0, 0]] * 2
    assert ReserveMaxTokens().survival(produced, max_tokens, ahead).T.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
