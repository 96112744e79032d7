"""Which requests end because of the time, and what the scheduler keeps of those that ended before it."""

from __future__ import annotations

import random

from support.scheduler.scheduling import make, request, step

from nanoflow_backend.request.request import Request
from nanoflow_backend.request.sampling_params import SamplingParams
from nanoflow_backend.scheduler.batch import FinishReason
from nanoflow_backend.scheduler.deadlines import MOST_EACH, SPARE, Deadlines

DAY_S = 86_400.0


def timed(id: int, deadline: float | None, queue_deadline: float | None) -> Request:
    return Request(id, [1], SamplingParams(), deadline=deadline, queue_deadline=queue_deadline)


def test_a_scheduler_keeps_no_deadlines_of_ended_requests() -> None:
    s = make()
    for id in range(2000):
        s.add(request(id, 3, deadline=DAY_S, max_tokens=1))
        step(s)
        assert len(s._deadlines) <= SPARE + 1
    assert not s.live_ids


def test_what_is_due_is_told_once_in_order_and_only_of_the_living() -> None:
    """Random requests that come, end and come again under their old ids, against a list that is searched."""
    rng = random.Random(0)
    deadlines = Deadlines()
    living: dict[int, Request] = {}
    told: set[tuple[int, FinishReason]] = set()
    for now in range(5000):
        id = rng.randrange(300)
        if id in living:
            del living[id]
            deadlines.forget(id)
        else:
            due = [now + rng.choice((5, 50, 10**6)) if rng.random() < 0.7 else None for _ in range(2)]
            living[id] = timed(id, *due)
            deadlines.add(living[id])
            told -= {(id, reason) for reason in FinishReason}
        both = [
            (due, id, reason)
            for id, r in living.items()
            for due, reason in ((r.deadline, FinishReason.DEADLINE), (r.queue_deadline, FinishReason.QUEUE_TIMEOUT))
        ]
        expected = sorted((due, *key) for due, *key in both if due is not None and due <= now and (*key,) not in told)
        told |= {(id, reason) for _, id, reason in expected}
        assert list(deadlines.take_due(now)) == expected
        assert len(deadlines) <= 2 * MOST_EACH * len(living) + SPARE
    assert len(told) > 50


def test_an_id_in_its_second_life_is_not_ended_by_the_deadline_of_its_first() -> None:
    now_s = 0.0
    s = make(clock=lambda: now_s)
    s.add(request(0, 3, deadline=5.0, max_tokens=1))
    step(s)
    s.add(request(0, 3, deadline=50.0, max_tokens=3))
    now_s = 10.0
    assert [delta.finish_reason for delta in step(s)] == [None]
    now_s = 51.0
    assert s.schedule() is None
    assert [delta.finish_reason for delta in s.retire(None)] == [FinishReason.DEADLINE]
