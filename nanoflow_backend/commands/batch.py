"""`nanoflow batch` completes a file of prompts, line for line, and goes on where a run before it was cut off."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nanoflow_backend.commands.settings import engine_config
from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.offline.job_file import JobFile
from nanoflow_backend.offline.made_with import MadeWith
from nanoflow_backend.offline.result_file import ResultFile

COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
INTERRUPTED = 130  # as shells have it


def batch(model: Path, input: Path, output: Path, settings: Sequence[str]) -> int:
    """The exit status: 0, or 1 if lines of the output are errors, those of runs that this one continues too.

    Raises: ConfigError when a file cannot be read or written, or the output does not continue this input.
    """
    config = engine_config(model, settings)
    jobs = JobFile(input)
    with ResultFile(output, input) as results:
        try:
            _complete(jobs, config, results)
        except KeyboardInterrupt:
            print(f"nanoflow: {results.lines} lines are done; the same command goes on there", file=sys.stderr)
            return INTERRUPTED
    print(f"nanoflow: {results.lines - results.failed} lines done, {results.failed} failed", file=sys.stderr)
    return 1 if results.failed else 0


def _complete(jobs: JobFile, config: EngineConfig, results: ResultFile) -> None:
    """Bring the results to the end of the jobs; the model is loaded only if there is something to do."""
    from nanoflow_backend.engine import LLM, Engine  # torch comes with them: what is wrong with a file is told first
    from nanoflow_backend.engine.settle import settled_here
    from nanoflow_backend.offline.run import run_jobs

    lines = results.resume(jobs.lines(), MadeWith.of(settled_here(config)))
    first = next(lines, None)
    if first is None:
        return
    llm = LLM(Engine(config))
    with Progress(*COLUMNS, console=Console(stderr=True)) as progress:
        task = progress.add_task("completions", total=jobs.count(), completed=results.lines)
        for _ in run_jobs(chain([first], lines), llm, results, config.seed):
            progress.update(task, completed=results.lines)
    llm.close()
