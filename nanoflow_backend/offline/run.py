"""run_jobs takes the lines of an input through a runner to their results. A runner is one engine, or several."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

from msgspec.structs import replace

from nanoflow_backend.engine.completion import Completion, Job
from nanoflow_backend.offline.job_file import JobLine
from nanoflow_backend.offline.result_file import ResultFile
from nanoflow_backend.offline.result_line import ResultLine
from nanoflow_backend.request.internal_error import RequestError
from nanoflow_backend.request.sampling_params import InvalidRequest
from nanoflow_backend.text.tokenizer import Tokenizer

Key = TypeVar("Key")
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

    Memory holds what the runner has taken and `most_early_bytes` of results, however many lines there are.
    """

    def paced() -> Iterator[tuple[int, JobLine] | None]:
        for line in lines:
            while results.early_bytes > most_early_bytes:
                yield None
            results.expect(line.number, line.digest)
            yield line.number, line

    return complete_lines(paced(), runner, results.put, seed)


def complete_lines(
    lines: Iterable[tuple[Key, JobLine] | None], runner: Runner, put: Callable[[Key, ResultLine], None], seed: int
) -> Iterator[None]:
    """Call `put(key, result)` for each (key, line), a bad line's at once; yields after each of the runner's.

    None among the lines means that there is none for now, as among a runner's jobs. A job without a seed gets one drawn
    from `seed` and its line's number, so that results are the same whatever engine has it, and in a run that was
    stopped and went on.
    """
    taken: dict[int, tuple[Key, Any]] = {}  # key and id of the line, by number of the job

    def jobs() -> Iterator[Job | None]:
        number = 0
        for keyed in lines:
            if keyed is None:
                yield None
                continue
            key, line = keyed
            if isinstance(line.job, InvalidRequest):
                put(key, ResultLine.of(line.id, line.job, runner.tokenizer))
                continue
            taken[number] = key, line.id
            number += 1
            yield seeded(line.job, seed, line.number)

    for number, result in runner.complete(jobs()):
        key, id = taken.pop(number)
        put(key, ResultLine.of(id, result, runner.tokenizer))
        yield


def seeded(job: Job, seed: int, number: int) -> Job:
    """Return the job with a seed: its own, or one drawn from the run's seed and the number of its line."""
    prompt, params = job
    if params.seed is not None:
        return job
    drawn = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest()
    return prompt, replace(params, seed=int.from_bytes(drawn) % 2**63)
