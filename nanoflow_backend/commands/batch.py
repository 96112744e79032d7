"""nanoflow batch: a file of prompts to a file of completions, line for line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nanoflow_backend.commands.settings import engine_config
from nanoflow_backend.offline.job_file import JobFile
from nanoflow_backend.offline.local import LocalRunner, settled_here
from nanoflow_backend.offline.made_with import MadeWith
from nanoflow_backend.offline.result_file import ResultFile
from nanoflow_backend.offline.run import run

COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
INTERRUPTED = 130  # as shells have it


def batch(model: Path, input: Path, output: Path, settings: Sequence[str]) -> int:
    """The exit status: 0, or 1 if lines of the output are errors, those of runs that this one continues too.

    Raises: ConfigError when a file cannot be read or written, or the output does not continue this input.
    """
    jobs = JobFile(input)
    config = engine_config(model, settings)
    with ResultFile(output, input, MadeWith.of(settled_here(config))) as results:
        lines = results.resume(jobs.lines())
        first = next(lines, None)
        if first is not None:
            runner = LocalRunner(config)
            with Progress(*COLUMNS, console=Console(stderr=True)) as progress:
                task = progress.add_task("completions", total=jobs.count(), completed=results.lines)
                try:
                    for _ in run(chain([first], lines), runner, results):
                        progress.update(task, completed=results.lines)
                except KeyboardInterrupt:
                    progress.stop()
                    print(f"nanoflow: {results.lines} lines are done; the same command goes on there", file=sys.stderr)
                    return INTERRUPTED
            runner.close()
    print(f"nanoflow: {results.lines - results.failed} lines done, {results.failed} failed", file=sys.stderr)
    return 1 if results.failed else 0
