import random
from array import array

import numpy as np
import pytest

from nanoflow_backend.bench.reservation import ReserveMaxTokens
from nanoflow_backend.request.sampling_params import SamplingParams
from nanoflow_backend.scheduler.forecast.length_forecast import LengthForecast
from nanoflow_backend.scheduler.forecast.page_forecast import MOMENTS, PageForecast
from nanoflow_backend.scheduler.page_account import KnownPrefix, PageAccount
from nanoflow_backend.scheduler.sequence import Sequence


def sequence(prompt_tokens: int, output_tokens: int, max_tokens: int, first_token: int = 0) -> Sequence:
    return Sequence(
        id=0,
        index=0,
        params=SamplingParams(),
        effective_arrival_s=0.0,
        arrival_number=0,
        prompt_tokens=prompt_tokens,
        max_total_tokens=prompt_tokens + max_tokens,
        stop_ids=frozenset(),
        tokens=array("i", range(first_token, first_token + prompt_tokens + output_tokens)),
    )


def admitted(account: PageAccount, s: Sequence) -> int:
    known = account.known_prefix(s)
    cost_pages = account.cost(s, known)
    account.open(s, known)
    s.num_computed_tokens = len(s.tokens)
    return cost_pages


@pytest.mark.parametrize("seed", range(3))
def test_peak_covers_the_mean_and_most_of_many_replays(seed: int) -> None:
    """Ends are drawn from the lengths that the forecast has learned; use is followed step by step."""
    rng = random.Random(seed)
    lengths = [rng.randint(1, 120) for _ in range(2000)]
    forecast = LengthForecast()
    for length in lengths:
        forecast.record(length)
    account = PageAccount(num_pages=4000, page_tokens=4, prefix_caching=False)
    running = [sequence(rng.randint(1, 60), rng.randint(0, 100), 200, 1000 * i) for i in range(60)]
    for s in running[:-1]:
        admitted(account, s)
    peak = PageForecast(running[:-1], account, forecast).add(running[-1], account.cost(running[-1], KnownPrefix([], 0)))
    survivors = [sorted(n for n in lengths if n > s.output_tokens) for s in running]
    peaks = []
    for _ in range(200):
        rests = [rng.choice(longer) - s.output_tokens for longer, s in zip(survivors, running, strict=True)]
        use = [
            sum((len(s.tokens) + t) / 4 + 0.5 for s, r in zip(running, rests, strict=True) if r >= t)
            for t in range(120)
        ]
        peaks.append(max(use))
    assert np.mean(peaks) < peak < 1.3 * np.mean(peaks)
    assert np.mean([p <= peak for p in peaks]) > 0.9


def test_reserving_max_tokens_adds_up() -> None:
    account = PageAccount(num_pages=100, page_tokens=4, prefix_caching=False)
    first, second = sequence(8, 0, 16), sequence(4, 0, 20, 500)
    admitted(account, first)
    peak = PageForecast([first], account, ReserveMaxTokens()).add(second, 1)
    end = MOMENTS[np.searchsorted(MOMENTS, 17)] - 1  # to the end of the interval that holds the last token
    assert peak == pytest.approx((8 + end) / 4 + 0.5 + (4 + end) / 4 + 0.5)


def test_a_shared_prefix_is_counted_once() -> None:
    account = PageAccount(num_pages=100, page_tokens=4, prefix_caching=True)
    first, second, third = (sequence(41, 0, 1) for _ in range(3))
    admitted(account, first)
    account.publish(first)
    assert admitted(account, second) == 1
    page_forecast = PageForecast([first, second], account, ReserveMaxTokens())
    assert page_forecast.add(third, account.cost(third, account.known_prefix(third))) == pytest.approx(11 + 1 + 1)
    account.close(first)
    page_forecast = PageForecast([second], account, ReserveMaxTokens())
    assert page_forecast.add(third, 1) == pytest.approx(10 + 1 + 1), "the prefix has no owner, and is still held"
