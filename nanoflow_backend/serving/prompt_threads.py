"""PromptThreads renders chats and tokenises long prompts beside the server's thread.

A chat template is a program, and a long prompt may keep it or the tokenizer busy for seconds. All other requests come
in by the server's one thread meanwhile, so that long prompts wait for each other only.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable

import msgspec

from nanoflow_backend.scheduler.waiting_queue import QueueFull
from nanoflow_backend.serving.failure import Failure, without_words
from nanoflow_backend.serving.reply import Channel

log = logging.getLogger(__name__)

THREADS = 2  # a second one, for prompts that take a millisecond to pass one that takes seconds
MOST_WAITING = 256  # requests, of at most 5 MiB each


class SlowRequest(msgspec.Struct, eq=False):
    """One that takes long to read: `prepare` makes of it what `start` takes. Whatever they raise goes to `refuse`.

    `due` is by when it must be started, of `time.monotonic()`, and what it is refused with then.
    """

    channel: Channel
    prepare: Callable[[], object]
    start: Callable[..., None]
    refuse: Callable[[Exception], None]
    due: tuple[float, Failure] | None = None


class PromptThreads:
    """Thread-safe. A request that `add` takes is started or refused, once: by whoever takes it out of the live ones."""

    def __init__(self) -> None:
        self._waiting: queue.Queue[SlowRequest | None] = queue.Queue(MOST_WAITING)
        self._lock = threading.Lock()
        self._live: set[SlowRequest] = set()
        self._closed: Failure | None = None
        self._threads = [threading.Thread(target=self._run, name=f"prompt-{n}", daemon=True) for n in range(THREADS)]
        for thread in self._threads:
            thread.start()

    def add(self, request: SlowRequest) -> None:
        """Raises: QueueFull, where as many wait as may; the Failure of `close` after it."""
        with self._lock:
            if self._closed is not None:
                raise self._closed
            try:
                self._waiting.put_nowait(request)
            except queue.Full:
                raise QueueFull(MOST_WAITING) from None
            self._live.add(request)

    def cancel(self, client_id: str) -> list[Channel]:
        """Refuse the requests of a client's id that are not started; their channels."""
        with self._lock:
            requests = [request for request in self._live if request.channel.request_id == client_id]
        return [request.channel for request in requests if self._end(request, _cancelled())]

    def refuse_overdue(self, now_s: float) -> None:
        """Refuse those that are due, also those that are being read: their threads go on for nobody."""
        with self._lock:
            late = [(request, request.due[1]) for request in self._live if request.due and request.due[0] <= now_s]
        for request, failure in late:
            self._end(request, failure)

    def close(self, failure: Failure, timeout_s: float) -> None:
        """Refuse every request that waits, and every later one; give up on those that are being read."""
        with self._lock:
            self._closed = failure
        with contextlib.suppress(queue.Empty):
            while True:
                if (request := self._waiting.get_nowait()) is not None:
                    self._end(request, failure)
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join(timeout_s)

    def _run(self) -> None:
        while (request := self._waiting.get()) is not None:
            try:
                self._serve(request)
            except Exception as error:
                self._end(request, error)

    def _serve(self, request: SlowRequest) -> None:
        with self._lock:
            if request not in self._live:
                return
        if request.channel.is_cancelled():
            raise _cancelled()
        prepared = request.prepare()
        if self._take(request):  # from now on it is the engine's
            try:
                request.start(prepared)
            except Exception as error:
                self._refuse(request, error)

    def _take(self, request: SlowRequest) -> bool:
        """Whether it is the caller's to start or to refuse: no other one has it."""
        with self._lock:
            is_live = request in self._live
            self._live.discard(request)
        return is_live

    def _end(self, request: SlowRequest, error: Exception) -> bool:
        """Refuse it, if it is live; whether it was."""
        if not self._take(request):
            return False
        self._refuse(request, error)
        return True

    def _refuse(self, request: SlowRequest, error: Exception) -> None:
        try:
            request.refuse(error)
        except Exception as broken:  # the server is gone; the thread has others
            log.error("a refusal broke: %s", without_words(broken))


def _cancelled() -> Failure:
    return Failure("CANCELLED", "the request was cancelled before it was read")
