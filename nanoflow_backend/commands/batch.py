"""`nanoflow batch` completes a file of prompts, line for line, and goes on where a run before it was cut off."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from nanoflow_backend.commands.batch_progress import BatchProgress
from nanoflow_backend.commands.settings import engine_config
from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.offline.job_file import JobFile
from nanoflow_backend.offline.made_with import MadeWith
from nanoflow_backend.offline.result_file import ResultFile

if TYPE_CHECKING:
    from nanoflow_backend.engine import Engine

INTERRUPTED = 130  # as shells have it


def batch(
    model: Path,
    input: Path,
    output: Path,
    settings: Sequence[str],
    cluster: str | None = None,
    replicas: int | None = None,
    make_engine: Callable[[EngineConfig], Engine] | None = None,
) -> int:
    """The exit status: 0, or 1 if lines of the output are errors, those of runs that this one continues too.

    Args:
        cluster: the address of a Ray cluster; None: this machine alone.
        replicas: engines there.
        make_engine: what makes an engine of a configuration; None: the real one.

    Raises:
        ConfigError: a file cannot be read or written, or the output does not continue this input.
        ClusterError: the cluster cannot complete the lines.
    """
    config = engine_config(model, settings)
    if cluster is None and replicas is not None:
        raise ConfigError("--replicas: expected --cluster with it, for this machine runs one engine")
    jobs = JobFile(input)
    with ResultFile(output, input) as results:
        try:
            _show(_complete(jobs, config, results, cluster, replicas or 1, make_engine), jobs, results)
        except KeyboardInterrupt:
            print(f"nanoflow: {results.lines} lines are done; the same command goes on there", file=sys.stderr)
            return INTERRUPTED
    print(f"nanoflow: {results.lines - results.failed} lines done, {results.failed} failed", file=sys.stderr)
    return 1 if results.failed else 0


def _complete(
    jobs: JobFile,
    config: EngineConfig,
    results: ResultFile,
    cluster: str | None,
    replicas: int,
    make_engine: Callable[[EngineConfig], Engine] | None,
) -> Iterator[None]:
    """Bring the results to the end of the jobs; the model is loaded only if there is something to do."""
    if cluster is not None:
        from nanoflow_backend.cluster.run import complete_on_cluster

        yield from complete_on_cluster(jobs, config, results, cluster, replicas, make_engine)
        return
    from nanoflow_backend.engine import LLM, Engine  # torch comes with them: what is wrong with a file is told first
    from nanoflow_backend.engine.settle import settled_here
    from nanoflow_backend.offline.run import run_jobs

    lines = results.resume(jobs.lines(), MadeWith.of(settled_here(config)))
    first = next(lines, None)
    if first is None:
        return
    llm = LLM((make_engine or Engine)(config))
    yield
    yield from run_jobs(chain([first], lines), llm, results, config.seed)
    llm.close()


def _show(steps: Iterator[None], jobs: JobFile, results: ResultFile) -> None:
    """Take all steps; a run with nothing to do shows nothing."""
    for _ in steps:
        break
    else:
        return
    with BatchProgress(jobs.count(), results) as progress:
        for _ in steps:
            progress.update()
