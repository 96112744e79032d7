"""EngineProcess is the engine as the server's stub sees it: a process that takes requests and sends news."""

from __future__ import annotations

import contextlib
import threading

import msgspec

from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.process.callbacks import Callbacks
from nanoflow_backend.process.child import Child, ChildDied
from nanoflow_backend.process.messages import (
    Cancel,
    Failed,
    FromEngine,
    Heartbeat,
    Load,
    News,
    Ready,
    Refusal,
    Start,
    Stats,
    Stop,
    Submit,
)
from nanoflow_backend.process.outbox import Outbox, OutboxFull
from nanoflow_backend.process.watchdog import Watchdog
from nanoflow_backend.request.request import Request
from nanoflow_backend.scheduler.batch import FinishReason
from nanoflow_backend.scheduler.waiting_queue import QueueFull


class EngineError(RuntimeError):
    """The engine did not start, or is gone: the message says why."""


class EngineProcess:
    """Submit requests from any thread; callbacks come on one reader thread. There is no torch in this process.

    Nothing here waits for the engine once that is ready, so that one which is stuck holds nobody up. It is killed after
    `engine_stall_s` of that.

    Args:
        host_pid: a server whose end must also be the end of this process and of the engine's.
    """

    def __init__(self, config: EngineConfig, callbacks: Callbacks, host_pid: int | None = None) -> None:
        self._config = config
        self._callbacks = callbacks
        self._host_pid = host_pid
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        self._reader = threading.Thread(target=self._read, name="engine-reader", daemon=True)
        self._changing = threading.Lock()
        self._child: Child | None = None
        self._outbox: Outbox | None = None  # once it is ready
        self._watchdog: Watchdog | None = None
        self._load: Load | None = None  # as the engine said last, once it is ready
        self._submitted = 0  # sequences
        self._stopping = False

    def start(self) -> Ready:
        """Wait until every rank is ready.

        Raises:
            EngineError: what failed; or another thread called `stop`.
        """
        try:
            with self._changing:
                if self._stopping:
                    raise EngineError("the engine was stopped before it was started")
                self._child = child = Child(
                    "nanoflow_backend.engine.loop", self._config.python, self._host_pid, group=True
                )
        except OSError as error:
            raise EngineError(f"python: {self._config.python}: {error.strerror}") from None
        try:
            child.send(Start(self._config))
            answer = child.receive(self._decoder)
        except ChildDied as death:
            child.close()
            raise EngineError(f"the engine did not start: {death}; its output is in the server's log") from None
        if isinstance(answer, Failed):
            child.stop()
            child.close()
            raise EngineError(answer.message)
        with self._changing:
            if not self._stopping:
                self._load = Load(0, 0, 0, answer.queue_room, 0)
                self._outbox = Outbox(child)
                if (limit_s := self._config.engine_stall_s) is not None:
                    why = f"it made no step for {limit_s:g} s (engine_stall_s)"
                    self._watchdog = Watchdog(limit_s, lambda: child.kill(why))
                self._reader.start()
                return answer  # type: ignore[no-any-return]
        child.close()
        raise EngineError("the engine was stopped while it started")

    @property
    def pid(self) -> int:
        return self._running().pid

    def check_room(self, sequences: int = 1) -> None:
        """Raises: QueueFull, where the engine would refuse so many: it says so itself only after its next step."""
        load, submitted = self._load, self._submitted
        if load is None:
            return
        coming = submitted - load.received
        if sequences > load.room - coming:
            raise QueueFull(load.waiting + coming, max(0, load.room - coming), sequences)

    def submit(self, *requests: Request) -> None:
        """The engine queues them all, or refuses each.

        Raises: EngineError, where the process is gone, or does not read what it was sent.
        """
        with self._changing:
            self._send(Submit(requests))
            self._submitted += sum(request.params.n for request in requests)

    def cancel(self, request_id: int, reason: FinishReason = FinishReason.CANCELLED, index: int | None = None) -> None:
        """End a request, or one of its sequences, early: the last delta of each gives the reason.

        What has ended already is left alone.
        """
        self._send(Cancel(request_id, reason, index), always=True)

    def stop(self) -> None:
        """Cancel what runs, end the process and the reader. Again, or before a start that went well, is harmless.

        A process that is not ready yet is killed.
        """
        with self._changing:
            if self._stopping:
                return
            self._stopping = True
            child, outbox = self._child, self._outbox
        if child is None:
            return
        if outbox is None:
            child.kill()
            return
        if self._watchdog is not None:
            self._watchdog.stop()
        with contextlib.suppress(ChildDied):
            outbox.put(Stop(), always=True)
        child.stop()
        self._reader.join()
        outbox.close("it was stopped")
        outbox.join()
        child.close()

    def _running(self) -> Child:
        if self._child is None:
            raise EngineError("the engine was not started")
        return self._child

    def _send(self, message: Submit | Cancel, always: bool = False) -> None:
        if self._outbox is None:
            raise EngineError("the engine was not started")
        try:
            self._outbox.put(message, always)
        except ChildDied as death:
            raise EngineError(f"the engine is gone: {death}") from None
        except OutboxFull as full:
            raise EngineError(str(full)) from None

    def _read(self) -> None:
        child = self._running()
        try:
            while True:
                message = child.receive(self._decoder)
                match message:
                    case News():
                        self._load = message.load
                        self._callbacks.on_news(message)
                    case Stats():
                        self._callbacks.on_stats(message)
                    case Heartbeat():
                        if self._watchdog is not None:
                            self._watchdog.hear(message)
                        self._callbacks.on_heartbeat(message)
                    case Refusal():
                        self._callbacks.on_refusal(message)
                    case Failed():
                        raise ChildDied(message.message)
        except Exception as death:  # of the child; or of this thread, after which nothing more would come either
            if not isinstance(death, ChildDied):
                child.kill(repr(death))
            self._ended(str(death) if isinstance(death, ChildDied) else repr(death))

    def _ended(self, how: str) -> None:
        if self._watchdog is not None:
            self._watchdog.stop()
        if self._outbox is not None:
            self._outbox.close(how)  # first: what is put in later hears of it here, and all else by the callback
        if not self._stopping:
            self._callbacks.on_death(how)
