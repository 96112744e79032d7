"""Whose turn it is among waiting requests, and when the queue is full."""

from __future__ import annotations

import pytest
from support.scheduler.scheduling import finish, make, request, step

from nanoflow_backend.request.request import Request
from nanoflow_backend.request.sampling_params import InvalidRequest, SamplingParams
from nanoflow_backend.scheduler.batch import FinishReason
from nanoflow_backend.scheduler.waiting_queue import QueueFull


def test_first_come_first_served_within_a_priority() -> None:
    s = make(max_running=1)
    for id, priority in ((0, 0), (1, 1), (2, 0), (3, -1)):
        s.add(request(id, 3, priority=priority, max_tokens=1))
    assert [step(s)[0].request_id for _ in range(4)] == [3, 0, 2, 1]


def order(*arrivals: tuple[float, int], aging_s: float) -> list[int]:
    """The order in which requests of (time, priority) run."""
    now_s = 0.0
    s = make(max_running=1, priority_aging_s=aging_s, clock=lambda: now_s)
    for id, (now_s, priority) in enumerate(arrivals):  # noqa: B007  the clock reads it
        s.add(request(id, 1, priority=priority, max_tokens=1))
    return list(finish(s))


def test_the_urgent_overtake_what_came_so_much_before_and_no_more() -> None:
    assert order((0, 1), (0, 0), (9, 0), (11, 0), (11, -1), aging_s=10) == [1, 4, 2, 0, 3]
    assert order((0, 1), (0, 0), (9, 0), (11, 0), (11, -1), aging_s=0) == [0, 1, 2, 3, 4]


def test_nobody_starves() -> None:
    """Two urgent requests come in the time of one: for ever, and the other one runs."""
    now_s = 0.0
    s = make(max_running=1, priority_aging_s=10, clock=lambda: now_s)
    s.add(request(0, 1, priority=3, max_tokens=1))
    for id in range(1, 200):
        now_s = id / 2
        if s.queue_room:
            s.add(request(id, 1, max_tokens=1))
        if id % 2 == 0 and any(delta.request_id == 0 for delta in step(s)):
            break
    assert 30 <= now_s <= 50


def test_who_has_not_begun_in_time_is_refused() -> None:
    now_s = 0.0
    s = make(max_running=1, clock=lambda: now_s)
    for id in range(3):
        s.add(Request(id, [1, 2], SamplingParams(max_tokens=10), queue_deadline=2.0 * (id + 1)))
    step(s)
    now_s = 5.0
    assert [(d.request_id, d.finish_reason) for d in step(s)] == [(1, FinishReason.QUEUE_TIMEOUT), (0, None)]
    assert finish(s) == {0: [7] * 8, 2: [7] * 10}


def test_it_says_who_begins_of_those_that_could_be_too_late() -> None:
    s = make(max_running=2, clock=lambda: 0.0)
    for id, queue_deadline in enumerate((9.0, None, 9.0, 9.0)):
        s.add(Request(id, [1, 2], SamplingParams(max_tokens=2, n=1 + (id == 3)), queue_deadline=queue_deadline))
    begun = []
    while s.has_work:
        step(s)
        begun.append(s.begun)
    # All of a step's; the second sequence of 3 begins with its first.
    assert [ids for ids in begun if ids] == [[0], [2, 3], [3]]
    assert begun[0] == [0]


def test_a_full_queue_says_how_long_it_is() -> None:
    s = make(max_queue_size=2, max_running=1)
    for id in range(3):
        s.add(request(id, 3))
    with pytest.raises(QueueFull, match="3 requests are waiting, as many as max_queue_size allows"):
        s.add(request(3, 3))
    step(s)
    with pytest.raises(QueueFull, match="2 requests are waiting"):
        s.add(request(3, 3))
    s.cancel(0)
    step(s)
    s.add(request(3, 3))
    assert s.queue_room == 0


def test_free_slots_are_room_too_unless_there_are_no_pages() -> None:
    s = make(max_queue_size=1, num_pages=4)
    for id in range(5):
        s.add(request(id, 12))
    with pytest.raises(QueueFull, match="5 requests are waiting"):
        s.add(request(5, 12))
    step(s)
    assert (s.stats.running_requests, s.stats.waiting_requests, s.queue_room) == (1, 4, 0)


def test_requests_that_come_together_are_all_queued_or_none() -> None:
    s = make(max_queue_size=6, max_running=1)
    s.add(request(0, 3))
    step(s)
    s.add(*(request(id, 3, n=2) for id in (1, 2)), request(3, 3))
    with pytest.raises(
        QueueFull, match="5 requests are waiting, and max_queue_size leaves room for 1 more, too few for 2"
    ):
        s.add(request(4, 3), request(5, 3))
    with pytest.raises(InvalidRequest, match="prompt: expected at most 63 tokens"):
        s.add(request(4, 3), request(5, 99))
    with pytest.raises(InvalidRequest, match="id: expected one that is not in use, got 4"):
        s.add(request(4, 3), request(4, 3))
    assert (s.waiting, s.queue_room, s.live_ids) == (5, 1, [0, 1, 2, 3])
    s.add(request(4, 3))
    assert sorted(finish(s)) == [0, 1, 2, 3, 4]


def test_more_than_may_ever_wait_is_invalid_however_empty_the_queue_is() -> None:
    s = make(max_queue_size=4)
    with pytest.raises(InvalidRequest, match=r"^prompts x n: expected at most 4 \(max_queue_size\), got 6"):
        s.add(request(0, 3, n=2), request(1, 3, n=2), request(2, 3, n=2))
    with pytest.raises(InvalidRequest, match=r"^n: expected at most 4 \(max_queue_size\), got 5"):
        s.add(request(0, 3, n=5))
    assert (s.waiting, s.live_ids) == (0, [])


def test_of_requests_that_come_together_some_may_be_held() -> None:
    s = make()
    s.add(request(0, 3), request(1, 3), held=[0])
    assert [delta.request_id for delta in step(s)] == [1]
    s.release(0)
    assert sorted(finish(s)) == [0, 1]
