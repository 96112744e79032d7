"""These functions say what each lane of a traced step did: its launches, and what it waited for between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nanoflow_backend.bench.step_trace.traced_steps import TracedStep
from nanoflow_backend.schedule.plan import Launch


@dataclass(frozen=True)
class LaneLaunch:
    """One launch on the tokens start .. stop - 1 of a batch; times of time.perf_counter()."""

    launch: Launch  # as the schedule has it; its range is scaled to the batch
    number: int  # in the schedule
    layer: int
    start: int
    stop: int
    sms: int | None  # None: all of the device
    begin_s: float
    end_s: float
    idle_from_s: float  # the end of the launch before it in its lane; of the first one, when the forward began
    awaited_s: float  # when the last of what it waits for in other lanes had ended; idle_from_s, if that was no wait
    awaited: Sequence[int]  # places of those launches, in the list that this one is in

    @property
    def wait_s(self) -> float:
        return self.awaited_s - self.idle_from_s


def lane_launches(step: TracedStep, num_layers: int) -> list[LaneLaunch]:
    """All launches of the layers in the order of issue.

    A launch that has nothing to do at this size of batch does not run. What it waits for holds up the next one of its
    lane, and who waits for it waits for the one before it.
    """
    schedule, ranges = step.plan.bound.schedule, step.plan.bound.schedule.fit(step.plan.tokens)
    times = {time.step: time for time in step.launches}
    awaited_by, found = schedule.awaited(num_layers), list[LaneLaunch]()
    last: dict[str, int | None] = dict.fromkeys(schedule.lanes)  # of each lane, so far, in `found`
    last_at: list[int | None] = []  # for each place in the order of issue, that of its lane
    pending: dict[str, set[int]] = {lane: set() for lane in schedule.lanes}  # what the lane's next launch waits for
    for place, (layer, number) in enumerate(step.plan.bound.steps):
        launch = schedule.launches[number]
        lane = launch.lane
        pending[lane] |= {target for at in awaited_by[place] if (target := last_at[at]) is not None}
        if place in times:
            before, time = last[lane], times[place]
            idle_from_s = step.forward_s[0] if before is None else found[before].end_s
            awaited, pending[lane] = sorted(pending[lane]), set()
            awaited_s = max((found[target].end_s for target in awaited), default=idle_from_s)
            last[lane] = len(found)
            found.append(
                LaneLaunch(
                    launch,
                    number,
                    layer,
                    *ranges[number],
                    schedule.sms(launch),
                    time.start_s,
                    time.end_s,
                    idle_from_s,
                    max(idle_from_s, awaited_s),
                    awaited,
                )
            )
        last_at.append(last[lane])
    return found


def lanes(steps: Sequence[TracedStep]) -> list[str]:
    """Of all plans of these steps, in the order of their first launches."""
    return list(dict.fromkeys(lane for step in steps for lane in step.plan.bound.schedule.lanes))
