"""TextStream turns one request's token ids into text as they come, up to its stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

import msgspec

from nanoflow_backend.request.sampling_params import InvalidRequest, SamplingParams
from nanoflow_backend.scheduler.batch import Delta, FinishReason, TokenLogprobs
from nanoflow_backend.text.stop_strings import StopStrings
from nanoflow_backend.text.tokenizer import Tokenizer

UTF8_MAX_BYTES = 4  # of one character


class TextDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What became safe to show of a request: text that nothing to come can take back or change.

    `token_ids` (and `logprobs`, one for each where asked for) are those of the step; their text may still be held
    back. The token that ended the request (EOS, a stop id, the one that completed a stop string) is among them and
    counts as output, as in vLLM; what the engine sampled after it is not.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or the stop token id; None for EOS
    cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs] | None = None


def merge(*deltas: TextDelta) -> TextDelta:
    """Consecutive deltas of one request as one, for a response that was still waiting to be sent."""
    logprobs = [delta.logprobs for delta in deltas if delta.logprobs is not None]
    last = next((delta for delta in deltas if delta.finish_reason is not None), deltas[-1])
    return TextDelta(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        logprobs=[entry for entries in logprobs for entry in entries] if logprobs else None,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        cached_tokens=max(delta.cached_tokens for delta in deltas),
        prompt_logprobs=next((d.prompt_logprobs for d in deltas if d.prompt_logprobs is not None), None),
    )


class TextStream:
    """Feed it every `Delta` of one request; not thread-safe.

    All texts together are what follows the prompt's text in the text of prompt and output together, up to the first
    stop string: neither that (unless `include_stop_str_in_output`) nor a part of it is ever shown. A stop string that
    is completed within the first `min_tokens` tokens does not stop. The EOS or stop id that ends a request has no text,
    unless `include_stop_str_in_output` (and, for EOS, not `skip_special_tokens`), as in vLLM.

    Malformed UTF-8 becomes U+FFFD as soon as it can no longer be completed. (`Tokenizer.decode` differs for
    SentencePiece byte tokens: one bad byte makes a whole run of them U+FFFD, even characters shown long before.)

    Without a tokenizer there are ids only.

    Attributes:
        finished: a push has had a finish reason. Where a stop string is the reason, the engine still runs the
            request: cancel it.
    """

    def __init__(self, tokenizer: Tokenizer | None, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        """Raises InvalidRequest when there are stop strings but no tokenizer."""
        if tokenizer is None and params.stop:
            raise InvalidRequest("stop: expected none, for the model has no tokenizer (use stop_token_ids)")
        self.finished = False
        self._text = None if tokenizer is None else _Text(tokenizer, params, prompt_ids)

    def push(self, delta: Delta) -> TextDelta:
        """The new text and ids. Whatever is pushed after the end is ignored: an empty delta."""
        if self.finished:
            return TextDelta()
        text, taken, stop = "", len(delta.token_ids), None
        if self._text is not None:
            text, taken, stop = self._text.add(delta)
        finish_reason = delta.finish_reason if stop is None else FinishReason.STOP
        self.finished = finish_reason is not None
        return TextDelta(
            text=text,
            token_ids=delta.token_ids[:taken],
            logprobs=None if delta.logprobs is None else delta.logprobs[:taken],
            finish_reason=finish_reason,
            stop_reason=delta.stop_reason if stop is None else stop,
            cached_tokens=delta.cached_tokens,
            prompt_logprobs=delta.prompt_logprobs,
        )


class _Text:
    """The text side of a stream: bytes of tokens -> characters -> what stop strings let through."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        self._min_tokens = params.min_tokens
        self._show_stop = params.include_stop_str_in_output
        self._bytes = tokenizer.token_bytes(params.skip_special_tokens)
        self._stops = StopStrings(params.stop, include=self._show_stop)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(self._bytes.decoding.errors)
        context = self._last_bytes(prompt_ids)
        self._utf8.decode(context)  # a prompt may end within a character
        self._at_start = not context
        self._tokens = 0

    def add(self, delta: Delta) -> tuple[str, int, str | None]:
        """(the text to show, how many of the delta's tokens count, the stop string that was found)."""
        token_ids = delta.token_ids
        ends_in_stop_token = delta.finish_reason is FinishReason.STOP and not self._show_stop
        worded = len(token_ids) - ends_in_stop_token  # that last one says "stop" and is not part of the text
        texts = []
        for index, token_id in enumerate(token_ids):
            self._tokens += 1
            if index < worded:
                texts.append(self._feed(self._bytes[token_id]))
                if self._stops.matched is not None:
                    return "".join(texts), index + 1, self._stops.matched
        if delta.finish_reason is not None:
            texts.append(self._feed(b"", final=True))
            if self._stops.matched is None:
                texts.append(self._stops.release())
        return "".join(texts), len(token_ids), self._stops.matched

    def _feed(self, piece: bytes, final: bool = False) -> str:
        if self._at_start and piece:
            self._at_start = False
            piece = self._bytes.decoding.first(piece)
        return self._stops.feed(self._utf8.decode(piece, final), may_stop=self._tokens > self._min_tokens)

    def _last_bytes(self, token_ids: Sequence[int]) -> bytes:
        """The end of a text, long enough to hold its last character; empty only when the text is."""
        context = b""
        for token_id in reversed(token_ids):
            context = self._bytes[token_id] + context
            if len(context) >= UTF8_MAX_BYTES:
                break
        return context
