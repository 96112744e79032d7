"""A Runner without a model, for tests of what surrounds one; as a program, a batch on it in a process of its own.

python arithmetic_runner.py INPUT OUTPUT [SECONDS_A_RESULT]
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.engine.completion import Completion, Job
from nanoflow_backend.offline.job_file import JobFile
from nanoflow_backend.offline.made_with import MadeWith
from nanoflow_backend.offline.result_file import ResultFile
from nanoflow_backend.offline.run import run_jobs
from nanoflow_backend.request.invalid_request import InvalidRequest
from nanoflow_backend.scheduler.batch import FinishReason

MADE_WITH = MadeWith(1, {"dtype": "float32", "seed": 0}, {"config.json": "c", "model.safetensors": "m"})


class ArithmeticRunner:
    """Answers a text with its letters reversed, in an order drawn by a seed; a text with "!" is refused.

    `slow_first`: the first job ends last.
    """

    tokenizer = None

    def __init__(self, most_running: int = 7, seconds: float = 0.0, slow_first: bool = False) -> None:
        self.most_running, self.seconds, self.slow_first = most_running, seconds, slow_first
        self.most_seen = 0  # jobs running at once

    def complete(self, jobs: Iterable[Job | None]) -> Iterator[tuple[int, Completion | InvalidRequest]]:
        draw, unread, running, number, exhausted = random.Random(0), iter(jobs), {}, 0, False
        while not exhausted or running:
            while not exhausted and len(running) < self.most_running:
                try:
                    job = next(unread)
                except StopIteration:
                    exhausted = True
                    break
                if job is None:
                    break
                running[number] = job
                number += 1
            self.most_seen = max(self.most_seen, len(running))
            if running:
                candidates = [key for key in running if key or not self.slow_first or exhausted] or list(running)
                key = draw.choice(candidates)
                time.sleep(self.seconds)
                yield key, answer(running.pop(key)[0])


class TwoRunners:
    """Deals jobs to two runners of different speed; numbers are those of the jobs as they came."""

    tokenizer = None

    def __init__(self) -> None:
        self.shares = [0, 0]

    def complete(self, jobs: Iterable[Job | None]) -> Iterator[tuple[int, Completion | InvalidRequest]]:
        unread, numbers = enumerate(jobs), ([], [])

        def share(which: int) -> Iterator[Job | None]:
            for number, job in unread:
                assert job is not None
                numbers[which].append(number)
                self.shares[which] += 1
                yield job

        streams = {which: ArithmeticRunner(2 + 5 * which).complete(share(which)) for which in (0, 1)}
        while streams:
            for which in list(streams):
                for _ in range(1 + which):
                    result = next(streams[which], None)
                    if result is None:
                        streams.pop(which, None)
                        break
                    yield numbers[which][result[0]], result[1]


def answer(prompt: str | list[int]) -> Completion | InvalidRequest:
    if "!" in prompt:
        return InvalidRequest("prompt: expected no !")
    text = "".join(reversed(str(prompt)))
    return Completion(
        text=text,
        token_ids=list(range(len(text))),
        finish_reason=FinishReason.LENGTH,
        stop_reason=None,
        num_input_tokens=len(prompt),
        num_cached_tokens=0,
    )


def main(input: str, output: str, seconds: str = "0") -> None:
    try:
        with ResultFile(Path(output), Path(input)) as results:
            lines = results.resume(JobFile(Path(input)).lines(), MADE_WITH)
            for _ in run_jobs(lines, ArithmeticRunner(seconds=float(seconds)), results):
                pass
    except ConfigError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
