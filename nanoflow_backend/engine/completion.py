"""Completion: what became of one prompt; and the loop that drives an engine from prompts to completions."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from nanoflow_backend.request.request import Request
from nanoflow_backend.request.sampling_params import InvalidRequest, SamplingParams
from nanoflow_backend.scheduler.batch import FinishReason, TokenLogprobs
from nanoflow_backend.text.bad_words import encode_bad_words
from nanoflow_backend.text.text_stream import TextDelta, TextStream, merge
from nanoflow_backend.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nanoflow_backend.engine.engine import Engine

Job = tuple[str | list[int], SamplingParams]  # a prompt, as text or as token ids, and how to continue it


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A whole continuation of one prompt. `text` is empty for a model without a tokenizer."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: str | int | None
    num_input_tokens: int
    num_cached_tokens: int
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None  # of all prompt tokens but the first; with index 0 only
    index: int = 0  # among the `n` of the prompt

    @classmethod
    def of(cls, deltas: list[TextDelta], num_input_tokens: int, index: int) -> Completion:
        whole = merge(*deltas)
        assert whole.finish_reason is not None, "a request that ended says why"
        return cls(
            text=whole.text,
            token_ids=list(whole.token_ids),
            finish_reason=whole.finish_reason,
            stop_reason=whole.stop_reason,
            num_input_tokens=num_input_tokens,
            num_cached_tokens=whole.cached_tokens,
            logprobs=whole.logprobs,
            prompt_logprobs=whole.prompt_logprobs,
            index=index,
        )


class Progress(NamedTuple):
    """What a step brought to one sequence of a prompt."""

    delta: TextDelta
    num_input_tokens: int
    sequence: int  # among the `n` of the prompt


@dataclass
class _Live:
    texts: list[TextStream]  # of each sequence
    num_input_tokens: int
    unfinished: int  # sequences


def stream(
    engine: Engine, tokenizer: Tokenizer | None, jobs: Iterable[Job | None]
) -> Iterator[tuple[int, Progress | InvalidRequest]]:
    """Run `jobs`, read one by one as the queue has room; yield (number of the job, what is new of it).

    None among the jobs means that there is none for now: the next step comes first. It has no number.

    One stream at a time: the numbers of its jobs are the ids of its requests.

    Raises:
        RuntimeError: the engine runs other requests.
    """
    if engine.scheduler.live_ids:
        raise RuntimeError("the engine runs other requests: expected their stream to be exhausted or closed first")
    unread = iter(jobs)
    numbers = itertools.count()
    live: dict[int, _Live] = {}
    exhausted = False
    read_ahead: Job | None = None  # has more sequences than there was room for
    try:
        while not exhausted or live:
            while not exhausted and engine.has_room():
                try:
                    job = read_ahead or next(unread)
                except StopIteration:
                    exhausted = True
                    break
                if job is None:
                    break
                if live and not engine.has_room(job[1].n):
                    read_ahead = job
                    break
                read_ahead, number = None, next(numbers)
                try:
                    live[number] = _submit(engine, tokenizer, number, *job)
                except InvalidRequest as error:
                    yield number, error
            deltas = engine.step()
            for number, refusal in engine.refused():
                if live.pop(number, None) is not None:
                    yield number, refusal
            for delta in deltas:
                request = live.get(delta.request_id)
                if request is None:  # refused
                    continue
                text = request.texts[delta.index]
                if not text.finished:
                    yield delta.request_id, Progress(text.push(delta), request.num_input_tokens, delta.index)
                if delta.finish_reason:
                    request.unfinished -= 1
                    if not request.unfinished:
                        del live[delta.request_id]
                elif text.finished:  # at a stop string, which the engine does not see
                    engine.cancel(delta.request_id, FinishReason.STOP, delta.index)
    except (Exception, GeneratorExit):  # a job broke, or the caller wants no more: the next stream finds nothing of it
        engine.cancel_all()
        while engine.has_work:
            engine.step()
        raise


def complete(
    engine: Engine, tokenizer: Tokenizer | None, jobs: Iterable[Job | None]
) -> Iterator[tuple[int, Completion | InvalidRequest]]:
    """Run `jobs` as `stream` does; yield (number of the job, a result) in order of ending: `n` for each, by index."""
    deltas: defaultdict[tuple[int, int], list[TextDelta]] = defaultdict(list)
    for number, progress in stream(engine, tokenizer, jobs):
        if isinstance(progress, InvalidRequest):
            yield number, progress
            continue
        key = number, progress.sequence
        deltas[key].append(progress.delta)
        if progress.delta.finish_reason:
            yield number, Completion.of(deltas.pop(key), progress.num_input_tokens, progress.sequence)


def _submit(
    engine: Engine, tokenizer: Tokenizer | None, number: int, prompt: str | list[int], params: SamplingParams
) -> _Live:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise InvalidRequest("prompt: expected token ids, for the model has no tokenizer")
        prompt = tokenizer.encode(prompt)
    params = encode_bad_words(params, tokenizer)
    texts = [TextStream(tokenizer, params, prompt) for _ in range(params.n)]
    engine.add(Request(number, prompt, params))
    return _Live(texts, len(prompt), params.n)
