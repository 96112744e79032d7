"""The watchdog: what counts as progress, and what as none."""

import pytest

from nanoflow_backend.process.messages import Heartbeat
from nanoflow_backend.process.watchdog import CHECK_PERIOD_S, Watchdog

LIMIT_S = 3.0


class World:
    """Time passes when it says so, and the watchdog looks every CHECK_PERIOD_S of it."""

    def __init__(self):
        self.now_s, self.stalls = 100.0, []
        self.watchdog = Watchdog(LIMIT_S, lambda: self.stalls.append(self.now_s), clock=lambda: self.now_s)
        self.watchdog._ticker.stop(30)  # its real time

    def pass_(self, seconds, heartbeat=None):
        """With a heartbeat every half a second; `heartbeat` makes the n-th."""
        for tick in range(round(seconds / CHECK_PERIOD_S)):
            self.now_s += CHECK_PERIOD_S
            if heartbeat and tick % 2:
                self.watchdog.hear(heartbeat(tick))
            self.watchdog.check()


@pytest.fixture
def world():
    return World()


@pytest.mark.parametrize(
    "heartbeat",
    [lambda tick: Heartbeat(tick, idle=False), lambda tick: Heartbeat(7, idle=True)],
    ids=["steps come back", "nothing to do"],
)
def test_an_engine_that_gets_on_or_has_nothing_to_do_is_left_alone(world, heartbeat):
    world.pass_(100, heartbeat)
    assert world.stalls == []


@pytest.mark.parametrize(
    "heartbeat", [None, lambda tick: Heartbeat(7, idle=False)], ids=["no sign of life", "a step that is stuck"]
)
def test_no_progress_for_the_limit_is_told_once(world, heartbeat):
    world.pass_(10, lambda tick: Heartbeat(7, idle=True))
    last_s = world.now_s
    world.pass_(10, heartbeat)
    (stall_s,) = world.stalls
    # The step counter of the last idle heartbeat is that of the hanging step, so its first one is no progress.
    assert stall_s - last_s == pytest.approx(LIMIT_S, abs=CHECK_PERIOD_S)


def test_a_step_just_shorter_than_the_limit_is_no_stall(world):
    for steps in range(20):
        world.watchdog.hear(Heartbeat(steps, idle=False))
        world.pass_(LIMIT_S - CHECK_PERIOD_S, lambda tick, steps=steps: Heartbeat(steps, idle=False))
    assert world.stalls == []


def test_time_in_which_we_did_not_run_either_does_not_count(world):
    world.pass_(1)
    world.now_s += 3600  # a container that was paused
    world.watchdog.check()
    world.pass_(1)
    assert world.stalls == []
    world.pass_(LIMIT_S)
    assert len(world.stalls) == 1


def test_after_a_stop_nothing_is_told(world):
    world.watchdog.stop()
    world.watchdog.stop()
    world.pass_(10)
    assert world.stalls == []
