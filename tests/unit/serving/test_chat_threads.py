"""Chats on their threads: each is started or refused exactly once, and a slow one holds up no more than it must."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
from support.waiting import until

from nanoflow_backend.scheduler.waiting_queue import QueueFull
from nanoflow_backend.serving import chat_threads
from nanoflow_backend.serving.chat_threads import Chat, ChatThreads
from nanoflow_backend.serving.failure import Failure

UNLOADED = Failure("UNAVAILABLE", "the model is being unloaded")


class Channel:
    def __init__(self, request_id: str) -> None:
        self.request_id, self.gone = request_id, False

    def is_cancelled(self) -> bool:
        return self.gone


class Desk:
    """Makes chats and notes how each ended."""

    def __init__(self) -> None:
        self.threads, self.ends, self.rendering = ChatThreads(), [], []
        self.released = threading.Event()

    def chat(self, request_id: str, prepare: Callable[[], object] | None = None) -> Chat:
        def rendered() -> object:
            self.rendering.append(request_id)
            assert self.released.wait(30)
            return request_id

        start = lambda prepared: self.ends.append((request_id, prepared))  # noqa: E731
        refuse = lambda error: self.ends.append((request_id, getattr(error, "code", str(error))))  # noqa: E731
        return Chat(Channel(request_id), prepare or rendered, start, refuse)

    def fill(self) -> None:
        """Keep every thread busy."""
        for index in range(chat_threads.THREADS):
            self.threads.add(self.chat(f"slow {index}"))
        until(lambda: len(self.rendering) == chat_threads.THREADS)


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk()
    yield desk
    desk.released.set()
    desk.threads.close(UNLOADED, 30)


def test_a_slow_chat_does_not_hold_up_another(desk: Desk) -> None:
    desk.threads.add(desk.chat("slow"))
    until(lambda: desk.rendering)
    desk.threads.add(desk.chat("quick", lambda: "text"))
    until(lambda: desk.ends == [("quick", "text")])


def test_what_preparing_raises_is_refused_and_the_thread_goes_on(desk: Desk) -> None:
    def broken() -> object:
        raise ValueError("no")

    for index in range(2 * chat_threads.THREADS):
        desk.threads.add(desk.chat(str(index), broken))
    until(lambda: sorted(desk.ends) == [(str(index), "no") for index in range(2 * chat_threads.THREADS)])


def test_a_cancelled_chat_is_not_started(desk: Desk) -> None:
    desk.fill()
    waiting = [desk.chat("x"), desk.chat("x"), desk.chat("y")]
    for chat in waiting:
        desk.threads.add(chat)
    assert len(desk.threads.cancel("x")) == 2
    assert len(desk.threads.cancel("slow 0")) == 1  # is being rendered
    waiting[2].channel.gone = True
    desk.released.set()
    until(lambda: len(desk.ends) == chat_threads.THREADS + 3)
    cancelled = [("slow 0", "CANCELLED"), ("x", "CANCELLED"), ("x", "CANCELLED"), ("y", "CANCELLED")]
    assert sorted(desk.ends) == sorted(
        [*cancelled, *((f"slow {i}", f"slow {i}") for i in range(1, chat_threads.THREADS))]
    )
    assert desk.rendering == [f"slow {i}" for i in range(chat_threads.THREADS)]
    until(lambda: not desk.threads.cancel("x"))


def test_cancelled_and_overdue_chats_are_refused_at_once_even_while_they_are_rendered(desk: Desk) -> None:
    late = Failure("UNAVAILABLE", "timeout")
    chats = [desk.chat(name) for name in ("rendered", "cancelled", "waits", "patient")]
    for chat, due_s in zip(chats, (5.0, 9.0, 5.0, None), strict=True):
        chat.due = None if due_s is None else (due_s, late)
        desk.threads.add(chat)
    until(lambda: desk.rendering == ["rendered", "cancelled"])
    assert len(desk.threads.cancel("cancelled")) == 1
    assert desk.ends == [("cancelled", "CANCELLED")]
    desk.threads.refuse_overdue(4.9)
    assert len(desk.ends) == 1
    desk.threads.refuse_overdue(5.0)
    desk.threads.refuse_overdue(99.0)
    assert sorted(desk.ends[1:]) == [("rendered", "UNAVAILABLE"), ("waits", "UNAVAILABLE")]
    desk.released.set()
    until(lambda: ("patient", "patient") in desk.ends)
    assert len(desk.ends) == 4, "none that was refused is started"
    assert "waits" not in desk.rendering


def test_no_more_wait_than_may(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.fill()
    for index in range(chat_threads.MOST_WAITING):
        desk.threads.add(desk.chat(str(index), lambda: "text"))
    with pytest.raises(QueueFull, match="256 requests are waiting"):
        desk.threads.add(desk.chat("one more"))
    desk.released.set()
    until(lambda: len(desk.ends) == chat_threads.THREADS + chat_threads.MOST_WAITING)


def test_the_end_refuses_what_waits_and_what_comes_later(desk: Desk) -> None:
    desk.fill()
    desk.threads.add(desk.chat("x"))
    desk.threads.close(UNLOADED, 0.01)
    assert desk.ends == [("x", "UNAVAILABLE")]
    with pytest.raises(Failure, match="unloaded"):
        desk.threads.add(desk.chat("y"))
