"""Prompts are cut so that steps with decodes take no longer than a target, whatever steps cost."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
import pytest

from nanoflow_backend.request.request import Request
from nanoflow_backend.request.sampling_params import SamplingParams
from nanoflow_backend.scheduler.batch import Batch, Sampled
from nanoflow_backend.scheduler.limits import SchedulerLimits
from nanoflow_backend.scheduler.pace import FIRST_TOKENS, LEAST_TOKENS, Pace, StepWork
from nanoflow_backend.scheduler.scheduler import Scheduler

TARGET_S = 0.02
Cost = Callable[[StepWork], float]


def h200(work: StepWork) -> float:
    """About an 8B model in 16 bits: reading weights, or arithmetic where that takes longer; and the KV cache."""
    tokens = work.decodes + work.prompt_tokens
    return max(0.0045, 3e-5 * tokens) + 3.2e-8 * work.decode_kv_tokens + 0.0005


def slow(work: StepWork) -> float:
    return 2 * h200(work)


def served(target_s: float | None, cost: Cost, *, rate: float, requests: int = 80) -> tuple[list[float], float, int]:
    """(seconds between tokens, all of them; seconds of the run; steps): Poisson arrivals, prompts of 200 to 3000."""
    rng = np.random.default_rng(7)
    arrivals_s = deque(np.cumsum(rng.exponential(1 / rate, requests)).tolist())
    now_s = [0.0]
    limits = SchedulerLimits(
        dense_batch_tokens=2048, chunk_tokens=2048, prompt_tokens=2048, max_running=2048, max_queue_size=requests,
        num_pages=10_000, page_tokens=64, max_model_tokens=8192, inter_token_target_s=target_s,
    )  # fmt: skip
    scheduler = Scheduler(limits, eos_token_ids=[0], prefix_caching=False, clock=lambda: now_s[0])
    last_s: dict[int, float] = {}
    gaps: list[float] = []
    in_flight: deque[tuple[Batch, float]] = deque()
    device_free_s, number, steps, ended = 0.0, 0, 0, 0
    while ended < requests:
        while arrivals_s and arrivals_s[0] <= now_s[0]:
            prompt = [1] * int(rng.integers(200, 3000))
            scheduler.add(Request(number, prompt, SamplingParams(max_tokens=int(rng.integers(20, 200)))))
            number, _ = number + 1, arrivals_s.popleft()
        batch = scheduler.schedule()
        if batch is not None:
            work = StepWork(
                len(batch.decode_slots), sum(batch.decode_positions), sum(len(p.token_ids) for p in batch.prefills)
            )
            device_free_s = max(device_free_s, now_s[0]) + cost(work)
            in_flight.append((batch, device_free_s))
            steps += 1
        elif not in_flight:
            now_s[0] = arrivals_s[0]
            continue
        sampled = None
        if len(in_flight) > (batch is not None):
            back, now_s[0] = in_flight.popleft()
            sampled = Sampled(back.step, [1] * len(back.sampled_slots))
        for delta in scheduler.retire(sampled):
            if delta.request_id in last_s:
                gaps.append(now_s[0] - last_s[delta.request_id])
            last_s[delta.request_id] = now_s[0]
            ended += delta.finish_reason is not None
    return gaps, now_s[0], steps


@pytest.mark.parametrize(("cost", "rate"), [(h200, 6.0), (h200, 12.0), (slow, 5.0)])
def test_tokens_come_within_the_target_and_prompts_lose_little(cost: Cost, rate: float) -> None:
    paced, took_s, _ = served(TARGET_S, cost, rate=rate)
    free, took_free_s, _ = served(None, cost, rate=rate)
    assert np.quantile(free, 0.99) > 2 * TARGET_S, "without a target there is nothing to see"
    assert np.quantile(paced, 0.99) < 1.1 * TARGET_S
    assert took_s < 1.1 * took_free_s
    assert len(paced) == len(free)


def test_a_target_that_is_never_reached_changes_nothing() -> None:
    assert served(10.0, h200, rate=12.0) == served(None, h200, rate=12.0)


def test_budget_is_what_the_line_leaves() -> None:
    pace, rng = Pace(TARGET_S, 2048), np.random.default_rng(3)
    for _ in range(200):
        work = StepWork(30, int(rng.integers(20_000, 60_000)), int(rng.integers(0, 600)))
        pace.measured(work, 0.004 + 1e-7 * work.decode_kv_tokens + 2e-5 * work.prompt_tokens)
    assert pace.prompt_tokens(30, 40_000) == pytest.approx((TARGET_S - 0.004 - 0.004) / 2e-5, rel=0.03)
    for _ in range(300):  # decodes alone: what prompts cost is remembered
        pace.measured(StepWork(30, 60_000, 0), 0.004 + 1e-7 * 60_000)
    assert pace.prompt_tokens(30, 60_000) == pytest.approx((TARGET_S - 0.004 - 0.006) / 2e-5, rel=0.05)
    assert pace.prompt_tokens(0, 0) == 2048, "nobody waits for a next token"
    assert pace.prompt_tokens(30, 10**6) == LEAST_TOKENS, "prompts get on all the same"


def test_it_begins_with_care_and_follows_a_device_that_changes() -> None:
    pace = Pace(TARGET_S, 2048)
    for _ in range(20):
        pace.measured(StepWork(8, 8_000, 0), 0.006)
    assert pace.prompt_tokens(8, 8_000) == FIRST_TOKENS
    for each_s in (2e-5, 6e-5, 1e-5):
        for step in range(200):
            tokens = pace.prompt_tokens(8, 8_000) if step % 2 else 0
            pace.measured(StepWork(8, 8_000, tokens), 0.006 + each_s * tokens)
        assert pace.prompt_tokens(8, 8_000) == pytest.approx(0.014 / each_s, rel=0.05)


def test_most_tokens_bound_it() -> None:
    pace = Pace(TARGET_S, 40)
    assert pace.prompt_tokens(8, 8_000) == 40
    pace.measured(StepWork(8, 8_000, 40), 1.0)
    assert pace.prompt_tokens(8, 8_000) == 40, "no more than the bound, though prompts get LEAST_TOKENS elsewhere"


def test_prompts_that_seem_to_cost_nothing_beside_decodes_that_take_longer_than_the_target() -> None:
    pace = Pace(TARGET_S, 2048)
    for step in range(50):
        pace.measured(StepWork(8, 8_000, 512 * (step % 2)), 0.03 - 0.001 * (step % 2))
    assert pace.prompt_tokens(8, 8_000) == LEAST_TOKENS
