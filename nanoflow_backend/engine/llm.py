"""LLM is the way to use an engine from Python: prompts go in as text or token ids, completions come out."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoflow_backend.engine.completion import Completion, Job, Progress
from nanoflow_backend.engine.engine import Engine
from nanoflow_backend.request.internal_error import InternalError, RequestError
from nanoflow_backend.request.request import Request
from nanoflow_backend.request.sampling_params import InvalidRequest, SamplingParams
from nanoflow_backend.scheduler.batch import Delta, FinishReason
from nanoflow_backend.text.bad_words import encode_bad_words
from nanoflow_backend.text.text_stream import TextStream
from nanoflow_backend.text.tokenizer import Tokenizer


class LLM:
    """Completes prompts on one engine, which serves nobody else meanwhile.

    `generate` returns all completions at once, `complete` yields each when it has ended, `stream` yields what every
    step adds.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @classmethod
    def from_pretrained(cls, model: str | Path, **config: Any) -> LLM:
        """Load the model of a Hugging Face folder; `config` are fields of EngineConfig.

        Raises:
            ConfigError: naming what is wrong in the folder or the fields.
        """
        return cls(Engine.from_pretrained(model, **config))

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None where the folder has no tokenizer.json: such a model continues token ids."""
        return self.engine.tokenizer

    def generate(
        self, prompts: Sequence[str | list[int]], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Complete `prompts` (texts or token ids), each with its own `params` or all with the same.

        Completions come in order of the prompts, `params.n` for each of them.

        Raises:
            InvalidRequest, InternalError: why a prompt has no result, with its number; the others are cancelled.
        """
        if isinstance(prompts, str) or any(isinstance(prompt, int) for prompt in prompts):
            raise InvalidRequest("prompts: expected a list of texts or of lists of token ids, got a single prompt")
        params = SamplingParams() if params is None else params
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        if len(each) != len(prompts):
            raise InvalidRequest(f"params: expected one, or one for each of {len(prompts)} prompts; got {len(each)}")
        results: dict[tuple[int, int], Completion] = {}
        for number, result in self.complete(zip(prompts, each, strict=True)):
            if isinstance(result, RequestError):
                raise type(result)(f"prompt {number}: {result}")
            results[number, result.index] = result
        return [results[key] for key in sorted(results)]

    def complete(self, jobs: Iterable[Job | None]) -> Iterator[tuple[int, Completion | RequestError]]:
        """Run `jobs` as `stream` does; yield (number of the job, a result) in order of ending: `n` for each, by index.

        Raises:
            RuntimeError: as `stream`.
        """
        deltas = defaultdict(list)
        for number, progress in self.stream(jobs):
            if isinstance(progress, RequestError):
                yield number, progress
                continue
            key = number, progress.sequence
            deltas[key].append(progress.delta)
            if progress.delta.finish_reason:
                yield number, Completion.of(deltas.pop(key), progress.num_input_tokens, progress.sequence)

    def stream(self, jobs: Iterable[Job | None]) -> Iterator[tuple[int, Progress | RequestError]]:
        """Run `jobs`, read one by one as the queue has room; yield (number of the job, what is new of it).

        None among the jobs means that there is none for now: the next step comes first. It has no number.
        One stream at a time: the numbers of its jobs are the ids of its requests. A stream that is closed early, or
        whose jobs raise, cancels its requests. At its end pages come to the tiers that they are on their way to, so far
        as `Engine.drain` waits for them; what is left goes on with the next stream.

        Raises:
            RuntimeError: the engine runs other requests.
        """
        engine = self.engine
        if engine.scheduler.live_ids:
            raise RuntimeError("the engine runs other requests: expected their stream to be exhausted or closed first")
        waiting = _JobQueue(jobs)
        live: dict[int, _Live] = {}
        try:
            while live or not waiting.exhausted:
                while numbered := waiting.next_job(engine, may_wait=bool(live)):
                    number, job = numbered
                    try:
                        live[number] = self._submit(number, *job)
                    except (InvalidRequest, InternalError) as error:
                        yield number, error
                deltas = engine.step()
                for number, refusal in engine.take_refused():
                    live[number].refused = True
                    yield number, refusal
                for delta in deltas:
                    request = live[delta.request_id]
                    if progress := request.take(delta):
                        yield delta.request_id, progress
                    if not request.unfinished:
                        del live[delta.request_id]
                    elif not delta.finish_reason and request.is_over(delta.index):
                        engine.cancel(delta.request_id, FinishReason.STOP, delta.index)
            engine.drain()
        except (Exception, GeneratorExit):  # a job broke, or the caller wants no more: the next stream finds nothing
            engine.cancel_all()
            while engine.scheduler.has_requests:
                engine.step()
            engine.take_refused()
            engine.drain()
            raise

    def close(self) -> None:
        """End the engine's processes, if it has others."""
        self.engine.close()

    def _submit(self, number: int, prompt: str | list[int], params: SamplingParams) -> _Live:
        tokenizer = self.tokenizer
        if isinstance(prompt, str):
            if tokenizer is None:
                raise InvalidRequest("prompt: expected token ids, for the model has no tokenizer")
            prompt = tokenizer.encode(prompt)
        params = encode_bad_words(params, tokenizer)
        texts = [TextStream(tokenizer, params, prompt) for _ in range(params.n)]
        self.engine.add(Request(number, prompt, params))
        return _Live(texts, len(prompt), params.n)


@dataclass
class _Live:
    """A request that has not ended."""

    texts: list[TextStream]  # of each sequence
    num_input_tokens: int
    unfinished: int  # sequences
    refused: bool = False  # its last deltas are still to come

    def take(self, delta: Delta) -> Progress | None:
        """What the delta adds to the text; None behind a stop string, which the engine does not see."""
        self.unfinished -= delta.finish_reason is not None
        text = self.texts[delta.index]
        return None if text.finished or self.refused else Progress(text.push(delta), self.num_input_tokens, delta.index)

    def is_over(self, sequence: int) -> bool:
        """A stop string has come, and the engine goes on; a refused request's end it knows."""
        return self.texts[sequence].finished and not self.refused


class _JobQueue:
    """Jobs that are not submitted yet, numbered from 0. At most one is read ahead of those that are."""

    def __init__(self, jobs: Iterable[Job | None]) -> None:
        self._unread = iter(jobs)
        self._numbers = itertools.count()
        self._read_ahead: Job | None = None  # has more sequences than there was room for
        self.exhausted = False

    def next_job(self, engine: Engine, may_wait: bool) -> tuple[int, Job] | None:
        """The next job and its number; None if there is none for now, or no room for all of its sequences.

        When it may not wait, because nothing runs that would make more room, the engine decides what becomes of it.
        """
        if self.exhausted or not engine.has_room():
            return None
        try:
            job = self._read_ahead or next(self._unread)
        except StopIteration:
            self.exhausted = True
            return None
        if job is None:
            return None
        if may_wait and not engine.has_room(job[1].n):
            self._read_ahead = job
            return None
        self._read_ahead = None
        return next(self._numbers), job
