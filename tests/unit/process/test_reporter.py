"""When an engine's load is told: with the deltas of a step, and before one that may be long."""

import pytest

from nanoflow_backend.process import reporter as module
from nanoflow_backend.process.reporter import LONG_STEP_S, Reporter
from nanoflow_backend.scheduler.batch import Delta

DELTA = Delta(1, (5,))


class Scheduler:
    def __init__(self):
        self.load, self.queue_room = (0, 0, 0), 9


class Loop:
    """An engine's loop with a clock of its own."""

    def __init__(self, monkeypatch):
        self.now_s, self.scheduler, self.told = 100.0, Scheduler(), []
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now_s)
        self.reporter = Reporter(self.told.append, self.scheduler)

    def step(self, scheduled, returned, takes_s, deltas=(DELTA,), begun=()):
        """The loads before and after it; what was said at each."""
        self.scheduler.load = scheduled
        self.reporter.scheduled(list(begun))
        early, self.told[:] = list(self.told), []
        self.now_s += takes_s
        self.scheduler.load = returned
        self.reporter.stepped(list(deltas), has_work=returned != (0, 0, 0))
        late, self.told[:] = list(self.told), []
        return [[(n.load.running, n.load.waiting, n.load.used_pages) for n in news] for news in (early, late)]


@pytest.fixture
def loop(monkeypatch):
    return Loop(monkeypatch)


def test_requests_that_begin_are_told_before_their_step(loop):
    assert loop.step((1, 0, 3), (1, 0, 3), 0.001) == [[(1, 0, 3)], [(1, 0, 3)]]
    assert loop.step((2, 0, 6), (1, 0, 3), 0.001) == [[(2, 0, 6)], [(1, 0, 3)]]


def test_in_short_steps_pages_and_the_queue_go_with_the_deltas(loop):
    loop.step((1, 0, 3), (1, 0, 3), 0.001)
    assert loop.step((1, 1, 4), (1, 1, 4), 0.001) == [[], [(1, 1, 4)]]
    assert loop.step((1, 1, 4), (1, 1, 4), 0.001) == [[], [(1, 1, 4)]], "every step with tokens says it"


def test_after_a_long_step_every_change_is_told_at_once(loop):
    loop.step((1, 0, 3), (1, 0, 3), 2 * LONG_STEP_S)
    assert loop.step((1, 1, 4), (1, 1, 4), 2 * LONG_STEP_S) == [[(1, 1, 4)], [(1, 1, 4)]]
    assert loop.step((1, 1, 4), (1, 1, 4), 0.001, deltas=()) == [[], []], "nothing has changed"
    assert loop.step((1, 2, 4), (1, 2, 4), 0.001, deltas=()) == [[], [(1, 2, 4)]]


def test_the_end_of_work_is_told_without_tokens(loop):
    loop.step((1, 0, 3), (1, 0, 3), 0.001)
    assert loop.step((1, 0, 3), (0, 0, 0), 0.001, deltas=()) == [[], [(0, 0, 0)]]


def test_requests_with_a_queue_deadline_are_named_before_their_step(loop):
    loop.scheduler.load = (1, 0, 3)
    loop.reporter.received = 4
    loop.reporter.scheduled([7])
    (news,) = loop.told
    assert (news.begun, news.deltas, news.load.room, news.load.received) == ([7], [], 9, 4)
