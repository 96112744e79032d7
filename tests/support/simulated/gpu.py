"""A GPU in simulated time: streams of bursts that share it, an energy counter that moves now and then, a clock."""

from __future__ import annotations

from collections import deque

from nanoflow_backend.runtime.gpu_meter import GpuReading

STEP_S = 1e-4
TICK_S = 0.02  # the energy counter moves
IDLE_W = 100.0


class SimulatedGpu:
    """Its meter and its clock are itself. Work of several streams runs at 1 / `crowd` of its speed."""

    power_limit_w = 700.0
    highest_sm_clock_mhz = 1980.0

    def __init__(self, crowd: float = 1.0) -> None:
        self.now_s = self.energy_j = self._ticked_j = 0.0
        self.streams: list[deque[SimulatedBurst]] = []
        self.idle_s = 0.0
        self._crowd = crowd

    def sleep(self, seconds: float) -> None:
        for _ in range(max(1, round(seconds / STEP_S))):
            self._step()

    def read(self) -> GpuReading:
        running = [stream[0] for stream in self._running()]
        clock = round(self.highest_sm_clock_mhz - sum(burst.watts for burst in running))
        return GpuReading(self.now_s, self._ticked_j, clock, 0, 0)

    def _step(self) -> None:
        before = int(self.now_s / TICK_S)
        self.now_s += STEP_S
        running = self._running()
        self.idle_s += 0.0 if running else STEP_S
        self.energy_j += STEP_S * (IDLE_W + sum(stream[0].watts for stream in running))
        for stream in running:
            burst = stream[0]
            burst.done_s += STEP_S / (self._crowd if len(running) > 1 else 1.0)
            burst.spent_s += STEP_S
            if burst.done_s >= burst.work_s - STEP_S / 2:
                stream.popleft()
                burst.is_ended = True
        if int(self.now_s / TICK_S) != before:
            self._ticked_j = self.energy_j

    def _running(self) -> list[deque[SimulatedBurst]]:
        return [stream for stream in self.streams if stream and (not stream[0].after or stream[0].after.is_ended)]


class SimulatedBurst:
    def __init__(self, gpu: SimulatedGpu, work_s: float, watts: float, after: SimulatedBurst | None) -> None:
        self.after = after
        self.work_s, self.watts, self.done_s, self.spent_s, self.is_ended = work_s, watts, 0.0, 0.0, False
        self._gpu = gpu

    def ended(self) -> bool:
        return self.is_ended

    def took_s(self) -> float:
        while not self.is_ended:
            self._gpu.sleep(STEP_S)
        return self.spent_s


class SimulatedWork:
    """A Repeated: bursts of `calls` calls, in a stream of its own; `watts` beyond those of an idle GPU."""

    def __init__(self, gpu: SimulatedGpu, call_s: float, watts: float, calls: int = 30) -> None:
        self.calls, self._gpu, self._call_s, self._watts = calls, gpu, call_s, watts
        self._stream: deque[SimulatedBurst] = deque()
        gpu.streams.append(self._stream)

    def launch(self, after: SimulatedBurst | None = None) -> SimulatedBurst:
        burst = SimulatedBurst(self._gpu, self.calls * self._call_s, self._watts, after)
        self._stream.append(burst)
        return burst
