"""ChatThreads renders and tokenises chats beside the server's thread.

A chat template is a program, and a long chat may keep it busy for seconds. All other requests come in by the server's
one thread meanwhile, so that chats wait for each other only.
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

THREADS = 2  # a second one, for chats that take a millisecond to pass one that takes seconds
MOST_WAITING = 256  # chats, of at most 4 MiB each


class Chat(msgspec.Struct, eq=False):
    """One request with messages: `prepare` makes of it what `start` takes. Whatever they raise goes to `refuse`.

    `due` is by when it must be started, of `time.monotonic()`, and what it is refused with then.
    """

    channel: Channel
    prepare: Callable[[], object]
    start: Callable[..., None]
    refuse: Callable[[Exception], None]
    due: tuple[float, Failure] | None = None


class ChatThreads:
    """Thread-safe. Each chat that `add` takes is started, or refused once: by whoever takes it out of the live ones."""

    def __init__(self) -> None:
        self._waiting: queue.Queue[Chat | None] = queue.Queue(MOST_WAITING)
        self._lock = threading.Lock()
        self._live: set[Chat] = set()
        self._closed: Failure | None = None
        self._threads = [threading.Thread(target=self._run, name=f"chat-{n}", daemon=True) for n in range(THREADS)]
        for thread in self._threads:
            thread.start()

    def add(self, chat: Chat) -> None:
        """Raises: QueueFull, where as many wait as may; the Failure of `close` after it."""
        with self._lock:
            if self._closed is not None:
                raise self._closed
            try:
                self._waiting.put_nowait(chat)
            except queue.Full:
                raise QueueFull(MOST_WAITING) from None
            self._live.add(chat)

    def cancel(self, client_id: str) -> list[Channel]:
        """Refuse the chats of a client's id that are not started; their channels."""
        with self._lock:
            chats = [chat for chat in self._live if chat.channel.request_id == client_id]
        return [chat.channel for chat in chats if self._end(chat, _cancelled())]

    def refuse_overdue(self, now_s: float) -> None:
        """Refuse those that are due, also those that are being rendered: their threads go on for nobody."""
        with self._lock:
            late = [(chat, chat.due[1]) for chat in self._live if chat.due and chat.due[0] <= now_s]
        for chat, failure in late:
            self._end(chat, failure)

    def close(self, failure: Failure, timeout_s: float) -> None:
        """Refuse every chat that waits, and every later one; give up on those that are being rendered."""
        with self._lock:
            self._closed = failure
        with contextlib.suppress(queue.Empty):
            while True:
                if (chat := self._waiting.get_nowait()) is not None:
                    self._end(chat, failure)
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join(timeout_s)

    def _run(self) -> None:
        while (chat := self._waiting.get()) is not None:
            try:
                self._serve(chat)
            except Exception as error:
                self._end(chat, error)

    def _serve(self, chat: Chat) -> None:
        with self._lock:
            if chat not in self._live:
                return
        if chat.channel.is_cancelled():
            raise _cancelled()
        prepared = chat.prepare()
        if self._take(chat):  # from now on it is the engine's
            try:
                chat.start(prepared)
            except Exception as error:
                self._refuse(chat, error)

    def _take(self, chat: Chat) -> bool:
        """Whether it is the caller's to start or to refuse: no other one has it."""
        with self._lock:
            is_live = chat in self._live
            self._live.discard(chat)
        return is_live

    def _end(self, chat: Chat, error: Exception) -> bool:
        """Refuse it, if it is live; whether it was."""
        if not self._take(chat):
            return False
        self._refuse(chat, error)
        return True

    def _refuse(self, chat: Chat, error: Exception) -> None:
        try:
            chat.refuse(error)
        except Exception as broken:  # the server is gone; the thread has other chats
            log.error("a refusal broke: %s", without_words(broken))


def _cancelled() -> Failure:
    return Failure("CANCELLED", "the request was cancelled before its messages were rendered")
