"""PromptFanIn lets the prompts of one request answer on the one channel of their client."""

from __future__ import annotations

import threading

import numpy as np

from nanoflow_backend.serving.failure import Failure
from nanoflow_backend.serving.reply import Channel
from nanoflow_backend.serving.tensors import Arrays, Parameters


class PromptFanIn:
    """Each prompt has a reply of its own, fed by whichever thread; here they share a channel. Thread-safe.

    In a stream each response is one prompt's, and the last of them all is final. Otherwise the answers are gathered
    into one response, each output in the order of the prompts. A failure of one is the failure of all: those that still
    run see a client that is gone.
    """

    def __init__(self, channel: Channel, stream: bool) -> None:
        self._channel = channel
        self._stream = stream
        self._lock = threading.Lock()
        self._waiting = 0  # prompts whose last response has not come
        self._over = False
        self._gathered: dict[int, Arrays] = {}

    def channels(self, prompts: int) -> list[Channel]:
        """One for each prompt."""
        self._waiting = prompts
        return [_Part(self, index, self._channel.request_id) for index in range(prompts)]

    def send(self, index: int, tensors: Arrays, final: bool, parameters: Parameters) -> None:
        with self._lock:
            if self._over:
                return
            self._waiting -= final
            last = self._waiting == 0
            if self._stream:
                self._channel.send(tensors, last, parameters)
            else:
                self._gathered[index] = tensors
                if last:
                    self._channel.send(self._all(), last, {})  # a parameter has one value
            self._over = last  # only now: where sending fails, `fail` must still get through

    def fail(self, failure: Failure) -> None:
        with self._lock:
            if not self._over:
                self._over = True
                self._channel.fail(failure)

    def is_cancelled(self) -> bool:
        return self._over or self._channel.is_cancelled()

    def _all(self) -> Arrays:
        parts = [self._gathered[index] for index in sorted(self._gathered)]
        names = [name for name in parts[0] if all(name in part for part in parts)]  # energy_j is not there at first
        return {name: np.concatenate([part[name] for part in parts]) for name in names}


class _Part:
    """One prompt's channel."""

    def __init__(self, fan_in: PromptFanIn, index: int, request_id: str) -> None:
        self.request_id = request_id
        self._fan_in = fan_in
        self._index = index

    def send(self, tensors: Arrays, final: bool, parameters: Parameters) -> None:
        self._fan_in.send(self._index, tensors, final, parameters)

    def fail(self, failure: Failure) -> None:
        self._fan_in.fail(failure)

    def is_cancelled(self) -> bool:
        return self._fan_in.is_cancelled()
