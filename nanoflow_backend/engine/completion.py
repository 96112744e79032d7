"""Completion: what became of one prompt; and the loop that drives an engine from prompts to completions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from nanoflow_backend.engine.text_stream import TextDelta, TextStream, merge
from nanoflow_backend.engine.tokenizer import Tokenizer
from nanoflow_backend.scheduler.batch import FinishReason, TokenLogprobs
from nanoflow_backend.scheduler.request import Request
from nanoflow_backend.scheduler.sampling_params import InvalidRequest, SamplingParams

if TYPE_CHECKING:
    from nanoflow_backend.engine.engine import Engine

Job = tuple[str | list[int], SamplingParams]  # a prompt, as text or as token ids, and how to continue it


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """The whole continuation of one prompt. `text` is empty for a model without a tokenizer."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: str | int | None
    num_input_tokens: int
    num_cached_tokens: int
    logprobs: list[TokenLogprobs] | None = None

    @classmethod
    def of(cls, deltas: list[TextDelta], num_input_tokens: int) -> Completion:
        whole = merge(*deltas)
        assert whole.finish_reason is not None, "a request that ended says why"
        return cls(
            text=whole.text,
            token_ids=whole.token_ids,
            finish_reason=whole.finish_reason,
            stop_reason=whole.stop_reason,
            num_input_tokens=num_input_tokens,
            num_cached_tokens=whole.cached_tokens,
            logprobs=whole.logprobs,
        )


class Progress(NamedTuple):
    """What a step brought to one prompt."""

    delta: TextDelta
    num_input_tokens: int


def stream(
    engine: Engine, tokenizer: Tokenizer | None, jobs: Iterable[Job]
) -> Iterator[tuple[int, Progress | InvalidRequest]]:
    """Run `jobs`, read one by one as the queue has room; yield (number of the job, what is new of it).

    One stream at a time: the numbers of its jobs are the ids of its requests.

    Raises:
        RuntimeError: the engine runs other requests.
    """
    if engine.scheduler.live_ids:
        raise RuntimeError("the engine runs other requests: expected their stream to be exhausted or closed first")
    numbered = enumerate(jobs)
    live: dict[int, tuple[TextStream, int]] = {}
    exhausted = False
    try:
        while not exhausted or live:
            while not exhausted and engine.has_room:
                number, job = next(numbered, (-1, None))
                if job is None:
                    exhausted = True
                    break
                try:
                    live[number] = _submit(engine, tokenizer, number, *job)
                except InvalidRequest as error:
                    yield number, error
            for delta in engine.step():
                text, num_input_tokens = live[delta.request_id]
                if not text.finished:
                    yield delta.request_id, Progress(text.push(delta), num_input_tokens)
                if delta.finish_reason:
                    del live[delta.request_id]
                elif text.finished:  # at a stop string, which the engine does not see
                    engine.cancel(delta.request_id, FinishReason.STOP)
    except (Exception, GeneratorExit):  # a job broke, or the caller wants no more: the next stream finds nothing of it
        engine.cancel_all()
        while engine.has_work:
            engine.step()
        raise


def complete(
    engine: Engine, tokenizer: Tokenizer | None, jobs: Iterable[Job]
) -> Iterator[tuple[int, Completion | InvalidRequest]]:
    """Run `jobs` as `stream` does; yield (number of the job, its result) in order of ending."""
    deltas: defaultdict[int, list[TextDelta]] = defaultdict(list)
    for number, progress in stream(engine, tokenizer, jobs):
        if isinstance(progress, InvalidRequest):
            yield number, progress
            continue
        deltas[number].append(progress.delta)
        if progress.delta.finish_reason:
            yield number, Completion.of(deltas.pop(number), progress.num_input_tokens)


def _submit(
    engine: Engine, tokenizer: Tokenizer | None, number: int, prompt: str | list[int], params: SamplingParams
) -> tuple[TextStream, int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise InvalidRequest("prompt: expected token ids, for the model has no tokenizer")
        prompt = tokenizer.encode(prompt)
    text = TextStream(tokenizer, params, prompt)
    engine.add(Request(number, prompt, params))
    return text, len(prompt)
