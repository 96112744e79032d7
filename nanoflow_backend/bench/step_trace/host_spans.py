"""HostSpans holds what a thread did and when, by the methods that it called."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple


class HostSpan(NamedTuple):
    """Work of one thread; times of time.perf_counter(). A span lies within another, or overlaps none."""

    name: str
    start_s: float
    end_s: float
    depth: int  # 0: within no other


class HostSpans:
    """Spans in order of their ends."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.spans: list[HostSpan] = []
        self._clock = clock
        self._depth = 0

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """What is done within is a span of this name, also when it fails."""
        depth, start_s = self._depth, self._clock()
        self._depth += 1
        try:
            yield
        finally:
            self._depth = depth
            self.spans.append(HostSpan(name, start_s, self._clock(), depth))

    def named(self, name: str) -> Callable[..., Any]:
        """Each call becomes a span; for `replaced`."""

        def spanned(call: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
            with self.span(name):
                return call(*args, **keywords)

        return spanned


def own_s(spans: Iterable[HostSpan]) -> Iterator[tuple[str, float]]:
    """(name, seconds) of each span without the spans within it, for spans in order of their ends."""
    within: dict[int, float] = {}  # seconds of the spans of a depth, since one that holds them
    for name, start_s, end_s, depth in spans:
        yield name, end_s - start_s - within.pop(depth + 1, 0.0)
        within[depth] = within.get(depth, 0.0) + end_s - start_s
