"""EngineTarget is an engine in the driver's own thread: each look for news is a step."""

from __future__ import annotations

import time
from collections.abc import Callable

from nanoflow_backend.bench.online.open_loop import Clock, News
from nanoflow_backend.engine import Engine, SamplingParams
from nanoflow_backend.request.internal_error import InternalError
from nanoflow_backend.request.request import Request
from nanoflow_backend.request.sampling_params import InvalidRequest
from nanoflow_backend.scheduler.waiting_queue import QueueFull


class EngineTarget:
    """A Target. As in the engine process, requests that are due are added between two steps."""

    def __init__(
        self, engine: Engine, clock: Clock = time.perf_counter, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._engine, self._clock, self._sleep = engine, clock, sleep
        self._refused: list[News] = []

    def send(self, request: int, prompt: list[int], output_tokens: int) -> None:
        params = SamplingParams(max_tokens=output_tokens, ignore_eos=True, temperature=0.0)
        try:
            self._engine.add(Request(request, prompt, params))
        except (QueueFull, InvalidRequest, InternalError) as error:
            self._refused.append(News(request, self._clock(), 0, ended=True, failed=str(error)))

    def receive(self, until_s: float) -> list[News]:
        refused, self._refused = self._refused, []
        if not self._engine.has_work:
            if not refused and until_s == float("inf"):
                raise RuntimeError("some requests have not ended, and the engine has no work")
            if not refused:
                self._sleep(max(until_s - self._clock(), 0.0))
            return refused
        deltas, now_s = self._engine.step(), self._clock()
        return refused + [
            News(delta.request_id, now_s, len(delta.token_ids), delta.finish_reason is not None) for delta in deltas
        ]

    def stop(self) -> None:
        self._engine.cancel_all()
        while self._engine.has_work:
            self._engine.step()
        self._engine.scheduler.forget_lengths()
