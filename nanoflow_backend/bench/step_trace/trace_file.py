"""trace_events writes traced steps in the trace-event format of Chrome, which Perfetto reads too."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

from nanoflow_backend.bench.step_trace.host_spans import own_s
from nanoflow_backend.bench.step_trace.lanes import LaneLaunch, lane_launches, lanes
from nanoflow_backend.bench.step_trace.traced_steps import Traced, TracedStep

HOST, DEVICE = 1, 2  # ids of processes in the file
ENGINE_THREAD = 1
STEP_LANE = 0  # before those of the schedule
Event = dict[str, Any]


def trace_events(traced: Traced, num_layers: int, device: str, sms: int | None) -> list[Event]:
    """`device` by name, with so many `sms`. Times are microseconds from the first step on.

    The host's spans, and for each lane of the schedule its launches and waits ("X"); arrows ("s" to "f") from a launch
    to one in another lane that waits for it, and from the issue of a step to the step; the tokens of a step ("C").
    """
    zero_s, numbers = min(span.start_s for span in traced.host), count(1)
    tracks = {lane: track for track, lane in enumerate(lanes(traced.steps), STEP_LANE + 1)}
    at = _Clock(zero_s)
    events = [*_names({STEP_LANE: "step", **{track: f"lane {lane}" for lane, track in tracks.items()}}, device)]
    for span in sorted(traced.host, key=lambda span: (span.start_s, span.depth)):
        events.append(at.slice(HOST, ENGINE_THREAD, "host", span.name, span.start_s, span.end_s))
    issued = sorted(span for span in traced.host if span.name == "issue")
    for step in traced.steps:
        events += _step(step, at)
        launches = lane_launches(step, num_layers)
        for launch in launches:
            track = tracks[launch.launch.lane]
            if launch.wait_s > 0:
                what = {"for": [_named(launches[target]) for target in launch.awaited]}
                events.append(at.slice(DEVICE, track, "wait", "wait", launch.idle_from_s, launch.awaited_s, what))
            events.append(at.slice(DEVICE, track, "launch", launch.launch.operation, launch.begin_s, launch.end_s,
                                   _facts(launch, sms)))  # fmt: skip
            for target in launch.awaited:
                source = launches[target]
                begin = DEVICE, tracks[source.launch.lane], source.begin_s
                events += at.arrow(next(numbers), "wait", begin, (DEVICE, track, launch.begin_s))
    for (_, start_s, *_), step in zip(issued, traced.steps, strict=True):
        events += at.arrow(
            next(numbers), "issue", (HOST, ENGINE_THREAD, start_s), (DEVICE, STEP_LANE, step.forward_s[0])
        )
    return events


def summary(traced: Traced, num_layers: int) -> dict[str, Any]:
    """Milliseconds a step of each operation, of each lane and of the host's work without what lies within it."""
    operations: defaultdict[str, float] = defaultdict(float)
    busy: defaultdict[str, float] = defaultdict(float)
    waits: defaultdict[str, float] = defaultdict(float)
    host: defaultdict[str, float] = defaultdict(float)
    for step in traced.steps:
        for launch in lane_launches(step, num_layers):
            took_s, lane = launch.end_s - launch.begin_s, launch.launch.lane
            operations[launch.launch.operation] += took_s
            busy[lane] += took_s
            waits[lane] += launch.wait_s
        operations["tail"] += step.tail_s[1] - step.tail_s[0]
    for name, seconds in own_s(traced.host):
        host[name] += seconds
    steps = len(traced.steps)
    return {
        "step_ms": round(1e3 * traced.wall_s / steps, 4),
        "operations_ms_per_step": _per_step(operations, steps),
        "lanes_busy_ms_per_step": _per_step(busy, steps),
        "lanes_waiting_ms_per_step": _per_step(waits, steps),
        "host_ms_per_step": _per_step(host, steps),
    }


class _Clock:
    """Makes events of times of time.perf_counter()."""

    def __init__(self, zero_s: float) -> None:
        self._zero_s = zero_s

    def us(self, time_s: float) -> float:
        return round(1e6 * (time_s - self._zero_s), 3)

    def slice(
        self,
        process: int,
        track: int,
        kind: str,
        name: str,
        start_s: float,
        end_s: float,
        args: Mapping[str, Any] | None = None,
    ) -> Event:
        start, end = self.us(start_s), self.us(end_s)  # rounded before the difference: neighbours stay apart
        where = {"name": name, "cat": kind, "ph": "X", "pid": process, "tid": track}
        return {**where, "ts": start, "dur": round(end - start, 3), **({"args": args} if args else {})}

    def arrow(
        self, number: int, kind: str, source: tuple[int, int, float], target: tuple[int, int, float]
    ) -> list[Event]:
        """From the slice at a moment to another; both as (process, track, seconds)."""
        ends = []
        for phase, (process, track, time_s) in (("s", source), ("f", target)):
            where = {"pid": process, "tid": track, "ts": self.us(time_s)}
            ends.append({"name": kind, "cat": kind, "ph": phase, "id": number, **where})
        ends[1]["bp"] = "e"  # the slice that holds the moment, not the next one
        return ends


def _names(tracks: Mapping[int, str], device: str) -> Iterator[Event]:
    for process, name in ((HOST, "host"), (DEVICE, device)):
        yield {"name": "process_name", "ph": "M", "pid": process, "args": {"name": name}}
        yield {"name": "process_sort_index", "ph": "M", "pid": process, "args": {"sort_index": process}}
    for process, track, name in (
        (HOST, ENGINE_THREAD, "engine's thread"),
        *((DEVICE, t, n) for t, n in tracks.items()),
    ):
        where = {"ph": "M", "pid": process, "tid": track}
        yield {"name": "thread_name", **where, "args": {"name": name}}
        yield {"name": "thread_sort_index", **where, "args": {"sort_index": track}}


def _step(step: TracedStep, at: _Clock) -> Iterator[Event]:
    batch, decodes = step.batch, len(step.batch.decode_slots)
    facts = {
        "step": batch.step,
        "decodes": decodes,
        "mean context of decodes": round(batch.decode_kv_tokens / decodes, 1) if decodes else None,
        "prompt tokens": batch.tokens - decodes,
        "rows with padding": step.plan.tokens,
        "schedule of tokens": step.plan.bound.schedule.tokens,
    }
    tokens = {"decodes": decodes, "prompts": batch.tokens - decodes}
    yield {"name": "tokens", "ph": "C", "pid": DEVICE, "tid": STEP_LANE, "ts": at.us(step.forward_s[0]), "args": tokens}
    yield at.slice(DEVICE, STEP_LANE, "step", "forward", *step.forward_s, facts)
    yield at.slice(DEVICE, STEP_LANE, "step", "tail", *step.tail_s, {"step": batch.step})


def _facts(launch: LaneLaunch, sms: int | None) -> dict[str, Any]:
    return {
        "operation": launch.launch.operation,
        "layer": launch.layer,
        "launch": launch.number,
        "tokens": f"{launch.start}..{launch.stop - 1}",
        "sms": launch.sms or sms,
    }


def _named(launch: LaneLaunch) -> str:
    return f"{launch.launch.operation} {launch.start}..{launch.stop - 1} of layer {launch.layer}"


def _per_step(seconds: Mapping[str, float], steps: int) -> dict[str, float]:
    return {name: round(1e3 * s / steps, 5) for name, s in sorted(seconds.items(), key=lambda item: -item[1])}
