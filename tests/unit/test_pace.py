"""Pace on a clock of the test."""

from hypothesis import given
from hypothesis import strategies as st

from nanoflow_backend.serving.pace import Pace


class Clock:
    def __init__(self):
        self.now_s = 128.0

    def __call__(self):
        return self.now_s

    def sleep(self, seconds):
        self.now_s += seconds


def times(pauses_s, per_s, burst):
    """When each `wait` returned, with a pause of the caller before each."""
    clock = Clock()
    pace = Pace(per_s, burst, clock, clock.sleep)
    returned = []
    for pause_s in pauses_s:
        clock.sleep(pause_s)
        pace.wait()
        returned.append(clock.now_s)
    return returned


def test_a_burst_goes_at_once_and_the_rest_at_the_pace():
    assert times([0] * 6, per_s=8, burst=4) == [128, 128, 128, 128, 128.125, 128.25]


def test_who_is_slower_never_waits():
    assert times([0.125] * 5, per_s=8, burst=1) == [128 + 0.125 * n for n in range(1, 6)]


@given(pauses_s=st.lists(st.floats(0, 1), min_size=1), per_s=st.integers(1, 1000), burst=st.integers(1, 20))
def test_no_window_has_more_than_the_pace_and_a_burst(pauses_s, per_s, burst):
    returned = times(pauses_s, per_s, burst)
    for first, begin_s in enumerate(returned):
        for last in range(first, len(returned)):
            assert last - first + 1 <= burst + (returned[last] - begin_s) * per_s + 1e-6
