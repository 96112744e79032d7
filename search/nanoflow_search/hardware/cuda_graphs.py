"""A CUDA graph repeats a call on the GPU without the host: it is captured once and replayed in bursts on a stream."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from nanoflow_search.hardware.sustain import BURST_S

GRAPH_S = 1e-3  # the aim for a graph's time: longer than its launch takes
MOST_CALLS = 512  # in one graph


class CudaBurst:
    """A `Burst` of work between two events of a stream."""

    def __init__(self, stream: torch.cuda.Stream, launches: Callable[[], None], after: CudaBurst | None = None) -> None:
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            if after:
                stream.wait_event(after._end)
            self._begin.record()
            launches()
            self._end.record()

    def ended(self) -> bool:
        """See Burst."""
        return bool(self._end.query())

    def took_s(self) -> float:
        """See Burst."""
        self._end.synchronize()
        return float(self._begin.elapsed_time(self._end)) / 1e3


class CapturedCalls:
    """A `RepeatedWork` of `call(i)` for i = 0 .. sets - 1 in turns, so that no call finds its inputs in the cache.

    `stream` may have SMs of its own, which the calls then keep to; None: a new stream of the whole device.
    """

    def __init__(self, call: Callable[[int], Any], sets: int, stream: torch.cuda.Stream | None = None) -> None:
        self._call = call  # its operands live as long as the graph that reads them
        self._stream = stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())

        def calls(count: int) -> None:
            for i in range(count):
                call(i % sets)

        CudaBurst(self._stream, lambda: calls(sets)).took_s()  # compiles
        turns, self._replays = 1, 1  # turns of all sets in a graph
        while True:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=self._stream):
                calls(turns * sets)
            self.launch().took_s()  # the first launch also uploads it
            took_s = self.launch().took_s()
            if took_s >= GRAPH_S / 2 or turns >= MOST_CALLS // sets:
                break
            turns = min(math.ceil(turns * GRAPH_S / took_s), MOST_CALLS // sets)
        self._replays = max(1, round(BURST_S / took_s))
        self.calls = turns * sets * self._replays

    def launch(self, after: Any = None) -> CudaBurst:
        """See RepeatedWork; `after` is a CudaBurst."""
        return CudaBurst(self._stream, self._replay, after)

    def _replay(self) -> None:
        for _ in range(self._replays):
            self._graph.replay()
