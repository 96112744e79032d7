"""The timeline of an offline run: its counts against a count token by token, its steady part on hand-made runs."""

import random

import pytest

from nanoflow_backend.bench.timeline import Counts, Sample, Timeline
from nanoflow_backend.runtime.gpu_meter import GpuReading
from nanoflow_backend.scheduler.batch import Batch, Prefill
from nanoflow_backend.scheduler.stats import SchedulerStats


def stats(running: int, waiting: int, finished: int, used_pages: int = 0) -> SchedulerStats:
    return SchedulerStats(
        waiting_requests=waiting,
        running_requests=running,
        num_pages=100,
        used_pages=used_pages,
        cached_pages=0,
        steps=0,
        finished_requests=finished,
        preemptions=0,
        overshoot_tokens=0,
        prefix_query_tokens=0,
        prefix_hit_tokens=0,
    )


def sample(at: int, running: int, waiting: int, finished: int) -> Sample:
    counts = Counts(steps=10 * at, prefill_tokens=500 * at, decode_tokens=400 * at, page_steps=600 * at)
    gpu = GpuReading(float(at), 700.0 * at, 1500, 100, 50)
    return Sample(float(at), counts, 400 * at, 80, stats(running, waiting, finished), gpu)


def run(requests: int, slots: int, residence_s: int) -> Timeline:
    """One sample a second of a server whose `slots` end one request each `residence_s`, evenly over time."""
    samples, finished = [], 0
    while finished < requests:
        running = min(slots, requests - finished)
        samples.append(sample(len(samples), running, requests - finished - running, finished))
        finished += -(-running // residence_s)
    return Timeline([*samples, sample(len(samples), 0, 0, requests)], dense_batch_tokens=128)


def test_counts_are_those_of_a_count_token_by_token():
    rng = random.Random(3)
    counts, expected = Counts(), Counts()
    for step in range(20):
        positions = [rng.randrange(50) for _ in range(rng.randrange(6))]
        prefills = [
            Prefill(slot, rng.randrange(40), [0] * rng.randint(1, 30), rng.random() < 0.5)
            for slot in range(rng.randrange(4))
        ]
        counts.add(Batch(step, list(range(len(positions))), positions, prefills, [], []), used_pages=step)
        expected.steps += 1
        expected.page_steps += step
        for position in positions:
            expected.decode_tokens += 1
            expected.sampled_rows += 1
            expected.kv_tokens_read += len(range(position + 1))
            expected.attended_pairs += len(range(position + 1))
        for prefill in prefills:
            expected.sampled_rows += prefill.sample
            for index, _ in enumerate(prefill.token_ids):
                expected.prefill_tokens += 1
                expected.attended_pairs += len(range(prefill.start + index + 1))
    assert counts == expected
    assert counts.since(counts) == Counts()


def test_the_steady_part_begins_after_two_residences_and_ends_with_the_queue():
    whole = run(requests=1200, slots=100, residence_s=10)
    steady = whole.steady()
    assert isinstance(steady, Timeline)
    assert (steady.samples[0].time_s, steady.samples[-1].time_s) == (20.0, 109.0)  # 1100 have left the queue by 110 s
    rates = steady.rates(steady.counts.tokens)
    assert rates["total_tokens_per_s"] == 900
    assert rates["output_tokens_per_s"] == 400
    assert (rates["mean_power_w"], rates["mj_per_token"]) == (700, pytest.approx(1e3 * 700 / 900, abs=1e-3))
    assert rates["dense_batch_fill"] == pytest.approx(90 / 128, abs=1e-4)
    assert (rates["kv_use_mean"], rates["kv_use_max"]) == (0.6, 0.8)


def test_a_run_that_is_too_short_says_why_and_how_many_requests_would_do():
    reason = run(requests=800, slots=100, residence_s=10).steady()
    assert isinstance(reason, str)
    assert reason.startswith("too short: requests waited for 69.0 s, expected 2 mean residences of a request (")
    residence_s = float(reason.partition("(")[2].partition(" s each")[0])
    assert residence_s == pytest.approx(10, rel=0.1)
    advised = int(reason.partition("--requests ")[2].partition(" ")[0])
    assert isinstance(run(advised, slots=100, residence_s=10).steady(), Timeline)


def test_points_add_up_to_the_run():
    whole = run(requests=300, slots=50, residence_s=5)
    points = whole.points()
    assert sum(point["prefill_tokens"] + point["decode_tokens"] for point in points) == whole.counts.tokens
    assert points[-1]["at_s"] == whole.wall_s
    assert points[0]["power_w"] == 700
