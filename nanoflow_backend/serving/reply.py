"""Reply: one request's way back to its client. Deltas of the engine go in, responses come out, the last one final."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from nanoflow_backend.engine.text_stream import TextDelta, TextStream, merge
from nanoflow_backend.engine.tokenizer import Tokenizer
from nanoflow_backend.scheduler.batch import Delta, FinishReason
from nanoflow_backend.serving.answer import Answer
from nanoflow_backend.serving.call import Call
from nanoflow_backend.serving.failure import Failure
from nanoflow_backend.serving.tensors import Arrays

log = logging.getLogger(__name__)


class Channel(Protocol):
    """The server's end of one request. Each call is a round trip to the server, some 100 us."""

    def send(self, tensors: Arrays, final: bool) -> None: ...

    def fail(self, failure: Failure) -> None:
        """Send the failure as the final response."""

    def is_cancelled(self) -> bool:
        """The server says that the client is gone. Nothing but this notices it."""


class Reply:
    """Fed by one thread. Whatever happens, the client gets exactly one final response, and it is the last one.

    Attributes:
        finished: it was sent; the engine, where it still runs the request, was told to stop.
    """

    def __init__(self, call: Call, channel: Channel, tokenizer: Tokenizer | None, cancel: Callable[[], None]) -> None:
        """`cancel` ends the request in the engine, which then reports a last delta."""
        self.channel = channel
        self.cancel = cancel
        self.finished = False
        self._call = call
        self._text = TextStream(tokenizer, call.params, call.prompt)
        self._answer = Answer(call, tokenizer)
        self._unsent: list[TextDelta] = []

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
                self._unsent.append(self._text.push(item))
            if self._text.finished or self._call.stream:
                self._send(merge(*self._unsent))
        except Failure as failure:
            self._fail(failure)
        except Exception as error:
            log.exception("a reply broke")
            self._fail(Failure("INTERNAL", f"{type(error).__name__}: {error}"))
        if self.finished and not any(isinstance(item, Delta) and item.finish_reason for item in news):
            self.cancel()  # a stop string, or a failure: the engine does not know yet

    def _send(self, delta: TextDelta) -> None:
        if delta.finish_reason is None and not self._worth_sending(delta):
            return
        self._unsent = []
        if delta.finish_reason is FinishReason.DEADLINE:
            raise Failure("UNAVAILABLE", f"timeout: not done {self._call.timeout_us} us after the request came")
        if delta.finish_reason is FinishReason.QUEUE_TIMEOUT:
            waited_us = self._call.queue_timeout_us
            raise Failure("UNAVAILABLE", f"queue_timeout: still waiting {waited_us} us after the request came")
        if delta.finish_reason is FinishReason.CANCELLED and "finish_reason" not in self._call.outputs:
            raise Failure("CANCELLED", "the request was cancelled")  # else a part would pass for the whole
        last = delta.finish_reason is not None
        self.channel.send(self._answer.tensors(delta), final=last)
        self.finished = last

    def _worth_sending(self, delta: TextDelta) -> bool:
        """Text is held back for a moment within a character or a possible stop string; ids never are."""
        outputs = self._call.outputs
        waits_for_text = "text_output" in outputs and "output_ids" not in outputs
        return bool(delta.text if waits_for_text else delta.token_ids)

    def _fail(self, failure: Failure) -> None:
        self.finished = True
        try:
            self.channel.fail(failure)
        except Exception:
            log.exception("the server did not take a final response")
