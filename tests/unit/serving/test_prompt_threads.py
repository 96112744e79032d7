"""Long prompts on their threads: each is started or refused once, and a slow one holds up no more than it must."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
from support.waiting import until

from nanoflow_backend.scheduler.waiting_queue import QueueFull
from nanoflow_backend.serving import prompt_threads
from nanoflow_backend.serving.failure import Failure
from nanoflow_backend.serving.prompt_threads import PromptThreads, SlowRequest

UNLOADED = Failure("UNAVAILABLE", "the model is being unloaded")


class Channel:
    def __init__(self, request_id: str) -> None:
        self.request_id, self.gone = request_id, False

    def is_cancelled(self) -> bool:
        return self.gone


class Desk:
    """Makes requests and notes how each ended."""

    def __init__(self) -> None:
        self.threads, self.ends, self.rendering = PromptThreads(), [], []
        self.released = threading.Event()

    def request(self, request_id: str, prepare: Callable[[], object] | None = None) -> SlowRequest:
        def rendered() -> object:
            self.rendering.append(request_id)
            assert self.released.wait(30)
            return request_id

        start = lambda prepared: self.ends.append((request_id, prepared))  # noqa: E731
        refuse = lambda error: self.ends.append((request_id, getattr(error, "code", str(error))))  # noqa: E731
        return SlowRequest(Channel(request_id), prepare or rendered, start, refuse)

    def fill(self) -> None:
        """Keep every thread busy."""
        for index in range(prompt_threads.THREADS):
            self.threads.add(self.request(f"slow {index}"))
        until(lambda: len(self.rendering) == prompt_threads.THREADS)


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk()
    yield desk
    desk.released.set()
    desk.threads.close(UNLOADED, 30)


def test_a_slow_request_does_not_hold_up_another(desk: Desk) -> None:
    desk.threads.add(desk.request("slow"))
    until(lambda: desk.rendering)
    desk.threads.add(desk.request("quick", lambda: "text"))
    until(lambda: desk.ends == [("quick", "text")])


def test_what_preparing_raises_is_refused_and_the_thread_goes_on(desk: Desk) -> None:
    def broken() -> object:
        raise ValueError("no")

    for index in range(2 * prompt_threads.THREADS):
        desk.threads.add(desk.request(str(index), broken))
    until(lambda: sorted(desk.ends) == [(str(index), "no") for index in range(2 * prompt_threads.THREADS)])


def test_a_cancelled_request_is_not_started(desk: Desk) -> None:
    desk.fill()
    waiting = [desk.request("x"), desk.request("x"), desk.request("y")]
    for request in waiting:
        desk.threads.add(request)
    assert len(desk.threads.cancel("x")) == 2
    assert len(desk.threads.cancel("slow 0")) == 1  # is being rendered
    waiting[2].channel.gone = True
    desk.released.set()
    until(lambda: len(desk.ends) == prompt_threads.THREADS + 3)
    cancelled = [("slow 0", "CANCELLED"), ("x", "CANCELLED"), ("x", "CANCELLED"), ("y", "CANCELLED")]
    assert sorted(desk.ends) == sorted(
        [*cancelled, *((f"slow {i}", f"slow {i}") for i in range(1, prompt_threads.THREADS))]
    )
    assert desk.rendering == [f"slow {i}" for i in range(prompt_threads.THREADS)]
    until(lambda: not desk.threads.cancel("x"))


def test_cancelled_and_overdue_requests_are_refused_at_once_even_while_they_are_read(desk: Desk) -> None:
    late = Failure("UNAVAILABLE", "timeout")
    requests = [desk.request(name) for name in ("rendered", "cancelled", "waits", "patient")]
    for request, due_s in zip(requests, (5.0, 9.0, 5.0, None), strict=True):
        request.due = None if due_s is None else (due_s, late)
        desk.threads.add(request)
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
    for index in range(prompt_threads.MOST_WAITING):
        desk.threads.add(desk.request(str(index), lambda: "text"))
    with pytest.raises(QueueFull, match="256 requests are waiting"):
        desk.threads.add(desk.request("one more"))
    desk.released.set()
    until(lambda: len(desk.ends) == prompt_threads.THREADS + prompt_threads.MOST_WAITING)


def test_the_end_refuses_what_waits_and_what_comes_later(desk: Desk) -> None:
    desk.fill()
    desk.threads.add(desk.request("x"))
    desk.threads.close(UNLOADED, 0.01)
    assert desk.ends == [("x", "UNAVAILABLE")]
    with pytest.raises(Failure, match="unloaded"):
        desk.threads.add(desk.request("y"))
