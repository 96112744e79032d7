"""trace_steps runs a few steps of an engine, and times all that the engine's thread and the device do in them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nanoflow_backend.bench.step_trace.host_spans import HostSpan, HostSpans
from nanoflow_backend.bench.step_trace.launch_times import LAPS, LaunchTime, LaunchTimes
from nanoflow_backend.bench.step_trace.replaced import replaced
from nanoflow_backend.engine import Engine
from nanoflow_backend.engine.step_inputs import StepInputs
from nanoflow_backend.engine.worker import InFlightStep, Worker
from nanoflow_backend.runtime.binding import FittedPlan
from nanoflow_backend.sampling.constraints import Masks
from nanoflow_backend.scheduler.batch import Batch, Delta


class WorkEndedError(Exception):
    """The engine has no work any more, and some was expected: the message says how much."""


@dataclass(frozen=True)
class TracedStep:
    """What a device did for one batch; times of time.perf_counter()."""

    batch: Batch
    plan: FittedPlan
    launches: Sequence[LaunchTime]  # of the layers, in the order of issue
    forward_s: tuple[float, float]  # inputs, embedding and layers: begin and end
    tail_s: tuple[float, float]  # LM head and sampling


@dataclass(frozen=True)
class Traced:
    """Consecutive steps, and the engine's thread meanwhile. `wall_s` is the time from the first to the last of them."""

    steps: Sequence[TracedStep]
    host: Sequence[HostSpan]
    wall_s: float


def trace_steps(
    engine: Engine, worker: Worker, times: LaunchTimes, steps: int, take: Callable[[list[Delta]], object]
) -> Traced:
    """Trace `steps` steps of an engine after LAPS more. `worker` is its rank 0; `take` gets the deltas of each step,
    in a span of its own.

    Raises:
        WorkEndedError: before that.
    """
    host, device = HostSpans(), _Device(worker, times)
    times.align()
    run_steps(engine, LAPS, lambda _: take(engine.step()))  # the device was idle: these fill it again
    with ExitStack() as watched:
        watched.enter_context(device.watched())
        for owner, method, name in _host_work(engine, worker):
            watched.enter_context(replaced(owner, method, host.named(name)))

        def step(number: int) -> None:
            times.lap = number % LAPS
            with host.span("step"):
                deltas = engine.step()
                with host.span("detokenise"):
                    take(deltas)
            with host.span("read the trace"):  # a part of what tracing costs: some microseconds an event
                device.read_all_but(engine.in_flight is not None)

        start_s = time.perf_counter()
        run_steps(engine, steps, step)
        wall_s = time.perf_counter() - start_s
        times.wait()
        device.read_all_but(0)
    return Traced(device.steps, host.spans, wall_s)


def run_steps(engine: Engine, steps: int, step: Callable[[int], object]) -> None:
    """Call `step` with 0, 1, ... steps - 1; each call makes a step of the engine. Raises: WorkEndedError."""
    for number in range(steps):
        if not engine.has_work:
            raise WorkEndedError(f"expected work for {steps} more steps, it ended after {number}")
        step(number)


def _host_work(engine: Engine, worker: Worker) -> list[tuple[object, str, str]]:
    """What the engine's thread does in a step: (owner, method, name)."""
    return [
        (engine.scheduler, "schedule", "schedule"),
        (engine.executor, "launch_forward", "launch forward"),
        (StepInputs, "pack", "pack"),
        (worker, "_send", "send"),
        (worker.program, "forward", "issue"),
        (engine.executor, "collect", "collect"),
        (engine.scheduler, "retire", "retire"),
        (engine, "_masks", "masks"),
        (engine.executor, "launch_tail", "launch tail"),
    ]


@dataclass(frozen=True)
class _Launched:
    batch: Batch
    plan: FittedPlan
    lap: int
    forward: tuple[Any, Any]  # marks
    tail: tuple[Any, Any]


class _Device:
    """Steps that were launched, and the times of those that are done."""

    def __init__(self, worker: Worker, times: LaunchTimes) -> None:
        self.steps: list[TracedStep] = []
        self._worker, self._times = worker, times
        self._forward: tuple[FittedPlan, tuple[Any, Any]]  # of the step whose tail is to come, and its marks
        self._launched: deque[_Launched] = deque()  # and not read yet

    @contextmanager
    def watched(self) -> Iterator[None]:
        self._worker.program.watch(self._times)
        try:
            with (
                replaced(self._worker.program, "forward", self._run_forward),
                replaced(self._worker, "launch_tail", self._launch_tail),
            ):
                yield
        finally:
            self._worker.program.watch(None)

    def read_all_but(self, newest: int) -> None:
        """The others are done."""
        while len(self._launched) > newest:
            done = self._launched.popleft()
            times = self._times.read(done.plan, done.lap)
            forward_s, tail_s = self._seconds(done.forward), self._seconds(done.tail)
            self.steps.append(TracedStep(done.batch, done.plan, times, forward_s, tail_s))

    def _run_forward(self, call: Callable[..., None], plan: FittedPlan, *inputs: Tensor) -> None:
        begin = self._times.mark()
        call(plan, *inputs)
        self._forward = plan, (begin, self._times.mark())

    def _launch_tail(self, call: Callable[..., None], step: InFlightStep, masks: Masks | None) -> None:
        (plan, forward), begin = self._forward, self._times.mark()
        call(step, masks)
        self._launched.append(_Launched(step.batch, plan, self._times.lap, forward, (begin, self._times.mark())))

    def _seconds(self, marks: tuple[Any, Any]) -> tuple[float, float]:
        begin, end = marks
        return self._times.seconds(begin), self._times.seconds(end)
