"""run_jobs takes the lines of an input through a runner to their results. A runner is one engine, or several."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from msgspec.structs import replace

from nanoflow_backend.engine.completion import Completion, Job
from nanoflow_backend.offline.job_file import JobLine
from nanoflow_backend.offline.result_file import ResultFile
from nanoflow_backend.request.internal_error import RequestError
from nanoflow_backend.request.sampling_params import InvalidRequest
from nanoflow_backend.text.logprobs_json import of_prompt, of_tokens
from nanoflow_backend.text.tokenizer import Tokenizer

MOST_EARLY_BYTES = 256 * 2**20  # of results that wait for a slow line before them


class Runner(Protocol):
    """Completes jobs. An LLM is one; so is whatever spreads jobs over several engines."""

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    def complete(self, jobs: Iterable[Job | None]) -> Iterator[tuple[int, Completion | RequestError]]:
        """Yield (number of the job, from 0; its result) in the order in which jobs end.

        Jobs are taken as there is room for them. None among them means that there is none for now: the runner asks
        again after its next step.
        """
        ...


def run_jobs(
    lines: Iterable[JobLine],
    runner: Runner,
    results: ResultFile,
    seed: int = 0,
    most_early_bytes: int = MOST_EARLY_BYTES,
) -> Iterator[None]:
    """Put a result for each line; yields after each of the runner's, for those who show progress.

    A job without a seed gets one drawn from `seed` and its line's number, so that results are the same whatever engine
    has it, and in a run that was stopped and went on.

    Memory holds what the runner has taken and `most_early_bytes` of results, however many lines there are.
    """
    taken: dict[int, tuple[int, Any]] = {}  # number and id of the line, by number of the job

    def jobs() -> Iterator[Job | None]:
        number = 0
        for line in lines:
            while results.early_bytes > most_early_bytes:
                yield None
            results.expect(line)
            if isinstance(line.job, InvalidRequest):
                results.put(line.number, result_line(line.id, line.job, runner.tokenizer))
                continue
            taken[number] = line.number, line.id
            number += 1
            yield seeded(line.job, seed, line.number)

    for number, result in runner.complete(jobs()):
        line_number, id = taken.pop(number)
        results.put(line_number, result_line(id, result, runner.tokenizer))
        yield


def seeded(job: Job, seed: int, number: int) -> Job:
    """Return the job with a seed: its own, or one drawn from the run's seed and the number of its line."""
    prompt, params = job
    if params.seed is not None:
        return job
    drawn = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest()
    return prompt, replace(params, seed=int.from_bytes(drawn) % 2**63)


def result_line(id: Any, result: Completion | RequestError, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """One line of the output: the id first; then an `error`, or the completion.

    `logprobs` and `prompt_logprobs` are there where they were asked for, in the form of the server's outputs.
    """
    if isinstance(result, RequestError):
        return {"id": id, "error": str(result)}
    fields = {
        "id": id,
        "text": result.text,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "num_input_tokens": result.num_input_tokens,
        "num_output_tokens": len(result.token_ids),
    }
    if result.logprobs is not None:
        fields["logprobs"] = of_tokens(result.logprobs, tokenizer)
    if result.prompt_logprobs is not None:
        fields["prompt_logprobs"] = of_prompt(result.prompt_logprobs, tokenizer)
    return fields
