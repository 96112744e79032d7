"""Times of launches in a trace: events that a CUDA graph records again and again, and what a launch has waited for."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from nanoflow_backend.bench.step_trace.lanes import lane_launches
from nanoflow_backend.bench.step_trace.launch_times import LaunchTime, RecordedLaunches
from nanoflow_backend.bench.step_trace.traced_steps import TracedStep
from nanoflow_backend.runtime.binding import FittedPlan
from nanoflow_backend.schedule.plan import Launch, Schedule, Wait


class Event:
    """Of a device that takes a millisecond from one event to the next."""

    now_ms = 0.0

    def __init__(self, enable_timing=False, external=False):
        assert enable_timing, "its time is asked for"
        self.external, self.records, self.at_ms = external, 0, None

    def record(self):
        Event.now_ms += 1.0
        self.records, self.at_ms = self.records + 1, Event.now_ms

    def synchronize(self):
        assert self.at_ms is not None

    def elapsed_time(self, later):
        return later.at_ms - self.at_ms


def test_events_of_a_plan_belong_to_a_lap_and_are_recorded_again(monkeypatch):
    """As a graph's nodes: a replay of one lap leaves the times of the other."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    times, plan = RecordedLaunches(cuda_graphs=True), FittedPlan(object(), 8)
    times.align()
    read = {}
    for lap in (0, 1, 0):
        times.lap = lap
        assert times.begin(plan) == lap
        ran = []
        for step in (2, 0):
            times.run(step, partial(ran.append, step))
        assert ran == [2, 0]
        read[lap] = times.read(plan, lap)
    first, second = read[0]
    assert (first.step, second.step) == (0, 2)
    assert first.end_s - first.start_s == pytest.approx(1e-3)
    assert second.end_s < first.start_s, "each in its place, whatever was launched first"
    assert read[1][1].end_s < read[0][1].start_s, "lap 0 ran again after lap 1"
    assert times.read(plan, 1) == read[1]
    events_of = times._of[plan, 0]
    assert {event.records for pair in events_of.values() for event in pair} == {2}
    assert all(event.external for pair in events_of.values() for event in pair), "nodes of a graph, not mere edges"


def test_a_launch_with_nothing_to_do_passes_its_waits_on():
    """With one token b (2..4) has no row: c waits for what ran before b, d for what b waits for."""
    launches = (
        Launch(operation="e", start=0, stop=4, lane="network"),
        Launch(operation="a", start=0, stop=2, lane="compute"),
        Launch(operation="b", start=2, stop=4, lane="compute", waits=(Wait(0),)),
        Launch(operation="c", start=0, stop=4, lane="memory", waits=(Wait(2),)),
        Launch(operation="d", start=0, stop=4, lane="compute"),
    )
    schedule = Schedule(tokens=4, launches=launches)
    plan = SimpleNamespace(bound=SimpleNamespace(schedule=schedule, steps=schedule.unroll(1)), tokens=1)
    times = [LaunchTime(0, 1.0, 9.0), LaunchTime(1, 2.0, 4.0), LaunchTime(3, 5.0, 6.0), LaunchTime(4, 10.0, 11.0)]
    e, a, c, d = lane_launches(TracedStep(SimpleNamespace(), plan, times, (0.5, 12.0), (12.0, 13.0)), num_layers=1)
    assert [x.launch.operation for x in (e, a, c, d)] == ["e", "a", "c", "d"]
    assert (a.start, a.stop, a.awaited, a.wait_s) == (0, 1, [], 0.0)
    assert (c.idle_from_s, c.awaited_s, c.awaited) == (0.5, 4.0, [1])
    assert (d.idle_from_s, d.awaited_s, d.awaited) == (4.0, 9.0, [0])
