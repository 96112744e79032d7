"""Reply is one request's way back to its client: deltas of the engine go in, responses come out, the last one final."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from nanoflow_backend.scheduler.account import Account
from nanoflow_backend.scheduler.batch import Delta, FinishReason
from nanoflow_backend.serving.answer import Answer
from nanoflow_backend.serving.call import Call
from nanoflow_backend.serving.failure import Failure, overdue, without_words
from nanoflow_backend.serving.tensors import ACCOUNT_OUTPUTS, Arrays, Parameters
from nanoflow_backend.telemetry.tracing import RequestTrace
from nanoflow_backend.text.text_stream import TextDelta, TextStream, merge
from nanoflow_backend.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class Channel(Protocol):
    """The server's end of one request. Each call is a round trip to the server, some 100 us."""

    request_id: str  # the client's; empty where it chose none

    def send(self, tensors: Arrays, final: bool, parameters: Parameters) -> None: ...

    def fail(self, failure: Failure) -> None:
        """Send the failure as the final response."""

    def is_cancelled(self) -> bool:
        """The server says that the client is gone. Nothing but this notices it."""


class Reply:
    """Fed by one thread. Whatever happens, the client gets exactly one final response, and it is the last one.

    Attributes:
        finished: it was sent; the engine, where it still runs the request, was told to stop.
        cancelled: nobody wants it any more, and the engine was told.
    """

    def __init__(
        self,
        call: Call,
        channel: Channel,
        tokenizer: Tokenizer | None,
        cancel: Callable[[FinishReason, int | None], None],
        trace: RequestTrace | None = None,
    ) -> None:
        """`cancel` ends the request in the engine, or one sequence of it, which then reports a last delta of each."""
        self.channel = channel
        self.finished = False
        self.cancelled = False
        self._call = call
        self._cancel = cancel
        self._texts = [TextStream(tokenizer, call.params, call.prompt) for _ in range(call.params.n)]
        self._running = set(range(call.params.n))  # the sequences that the engine may still run
        self._answer = Answer(call, tokenizer)
        self._unsent: list[list[TextDelta]] = [[] for _ in self._texts]  # of each sequence
        self._trace = trace
        self._accounts: list[Account] = []  # of the sequences that have ended
        self._needs_accounts = trace is not None or not call.outputs.isdisjoint(ACCOUNT_OUTPUTS)

    def cancel(self) -> None:
        """End the request in the engine: nobody wants it. Harmless when repeated."""
        if not self.cancelled:
            self.cancelled = True
            self._cancel(FinishReason.CANCELLED, None)

    def submitted(self) -> None:
        """The engine has the request from now on: a cancel that came before it is said again."""
        if self.cancelled:
            self._cancel(FinishReason.CANCELLED, None)

    def overdue(self, reason: FinishReason) -> Failure:
        """What its client is to be told when its time is over."""
        is_deadline = reason is FinishReason.DEADLINE
        return overdue(reason, self._call.timeout_us if is_deadline else self._call.queue_timeout_us)

    def awaits(self, delta: Delta) -> bool:
        """Whether something may have to be done now: nothing leaves early where no one waits for each token."""
        return self._call.stream or bool(self._call.params.stop) or delta.finish_reason is not None

    def feed(self, news: Sequence[Delta | Failure]) -> None:
        """Take news in order; send at most one response for all of it."""
        if self.finished:
            return
        try:
            for item in news:
                if isinstance(item, Failure):
                    raise item
                self._push(item)
            done = all(text.finished for text in self._texts)
            if self._has_accounts() if done else self._call.stream:
                self._send([merge(*deltas) if deltas else TextDelta() for deltas in self._unsent], done)
        except Failure as failure:
            self._fail(failure)
        except Exception as error:
            log.error("a reply broke: %s", without_words(error))
            self._fail(Failure("INTERNAL", f"{type(error).__name__}: {error}"))
        if self.finished and self._running:
            self.cancel()  # a failure: the engine does not know yet

    def _push(self, delta: Delta) -> None:
        text = self._texts[delta.index]
        if not text.finished:
            self._unsent[delta.index].append(text.push(delta))
        if delta.account is not None:
            self._accounts.append(delta.account)
        if delta.finish_reason is not None:
            self._running.discard(delta.index)
        elif text.finished and delta.index in self._running:  # a stop string, which the engine does not see
            self._running.discard(delta.index)
            self._cancel(FinishReason.STOP, delta.index)

    def _has_accounts(self) -> bool:
        """What the last response needs is there. After a stop string it comes with the engine's last delta."""
        return not self._needs_accounts or len(self._accounts) == len(self._texts)

    def _account(self) -> Account | None:
        return Account.joined(self._accounts) if self._accounts else None

    def _send(self, deltas: list[TextDelta], last: bool) -> None:
        if not any(delta.finish_reason or self._worth_sending(delta) for delta in deltas):
            return
        self._unsent = [[] for _ in deltas]
        reasons = {delta.finish_reason for delta in deltas}
        for reason in (FinishReason.DEADLINE, FinishReason.QUEUE_TIMEOUT):
            if reason in reasons:
                raise self.overdue(reason)
        if FinishReason.CANCELLED in reasons and "finish_reason" not in self._call.outputs:
            raise Failure("CANCELLED", "the request was cancelled")  # else a part would pass for the whole
        tensors = self._answer.tensors(deltas, self._account() if last else None, last)
        self.channel.send(tensors, last, self._answer.parameters() if last else {})
        self.finished = last
        if last:
            self._end_trace(self._answer.outcome)

    def _worth_sending(self, delta: TextDelta) -> bool:
        """Text is held back for a moment within a character or a possible stop string; ids never are."""
        outputs = self._call.outputs
        waits_for_text = "text_output" in outputs and "output_ids" not in outputs
        return bool(delta.text if waits_for_text else delta.token_ids)

    def _fail(self, failure: Failure) -> None:
        self.finished = True
        try:
            self.channel.fail(failure)
        except Exception as error:
            log.error("the server did not take a final response: %s", without_words(error))
        self._end_trace(failure.code)

    def _end_trace(self, outcome: str) -> None:
        if self._trace is not None:
            self._trace.end(outcome, len(self._call.prompt), self._answer.output_tokens, self._account())
