"""PendingGrammars holds the requests whose grammar is being compiled, and those that are refused for theirs."""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, Future, wait

from nanoflow_backend.request.internal_error import RequestError
from nanoflow_backend.sampling.grammar import Grammar
from nanoflow_backend.scheduler.batch import FinishReason
from nanoflow_backend.scheduler.scheduler import Scheduler

POLL_S = 0.01  # while there is nothing else to do


class PendingGrammars:
    """A request is held in the scheduler's queue until its grammar has compiled; if that fails, it is refused."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._compiling: dict[int, Future[Grammar]] = {}  # by request id
        self._refused: list[tuple[int, RequestError]] = []

    def __bool__(self) -> bool:
        """Some request waits."""
        return bool(self._compiling)

    def hold(self, request_id: int, grammar: Future[Grammar]) -> None:
        """The scheduler has this request, held."""
        self._compiling[request_id] = grammar

    def forget(self, request_id: int) -> None:
        """The request has ended, if it waited at all."""
        self._compiling.pop(request_id, None)

    def release_compiled(self) -> None:
        """Release requests whose grammar has compiled; refuse those whose grammar has not.

        Raises: whatever interrupts this process.
        """
        for request_id, grammar in list(self._compiling.items()):
            if not grammar.done():
                continue
            del self._compiling[request_id]
            error = grammar.exception()
            if error is None:
                self._scheduler.release(request_id)
            elif isinstance(error, RequestError):
                self.refuse(request_id, error)
            else:
                raise error

    def refuse(self, request_id: int, error: RequestError) -> None:
        """End the request; `take_refused` says why. One that has ended is left alone."""
        if self._scheduler.cancel(request_id, FinishReason.REFUSED):
            self._refused.append((request_id, error))

    def take_refused(self) -> list[tuple[int, RequestError]]:
        """The requests that were refused since the last call."""
        refused, self._refused = self._refused, []
        return refused

    def wait(self) -> None:
        """Until a compilation ends, or a moment has passed."""
        wait(self._compiling.values(), POLL_S, FIRST_COMPLETED)
