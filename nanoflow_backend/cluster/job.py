"""Job is the actor that drives a dataset inside the cluster; `results_of` is how the command gets at what comes out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data

from nanoflow_backend.cluster.engine_stage import MakeEngine
from nanoflow_backend.cluster.lines import LINES_PER_TASK, complete, concurrent_calls, file_parcels
from nanoflow_backend.cluster.parcels import ONE_ROW_A_BLOCK, ParcelStage
from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.offline.job_file import JobFile, LineRange
from nanoflow_backend.offline.made_with import MadeWith
from nanoflow_backend.offline.result_line import ResultLine

LEAST_BYTES = 64 * 2**20  # that the stages may have between them: a pipeline of Ray Data reads ahead so far


class Job:
    """Runs next to the input, so that lines and what is known of them outlive every other node.

    Raises: ConfigError, where the input cannot be read from there.
    """

    def __init__(
        self,
        input: str,
        ranges: Sequence[LineRange],
        config: EngineConfig,
        replicas: int,
        gpu: bool,
        made_with: MadeWith,
        make_engine: MakeEngine | None,
    ) -> None:
        file, node_id = JobFile(Path(input)), ray.get_runtime_context().get_node_id()
        line_bytes = Path(input).stat().st_size / (ranges[-1].number + ranges[-1].lines)
        in_flight = int(replicas * concurrent_calls(config, gpu) * LINES_PER_TASK * line_bytes)
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.execution_options.resource_limits = context.execution_options.resource_limits.copy(
            object_store_memory=max(LEAST_BYTES, 4 * in_flight)
        )
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.target_max_block_size = ONE_ROW_A_BLOCK
        parcels = file_parcels(file, ranges, node_id)
        dataset = complete(parcels, config, replicas, gpu, ParcelStage, 1, made_with, make_engine)
        self._tables = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1))

    def next_results(self) -> pa.Table | None:
        """Rows of PARCEL_RESULTS that follow those before; None at the end."""
        return next(self._tables, None)


def results_of(
    input: Path,
    ranges: Sequence[LineRange],
    config: EngineConfig,
    replicas: int,
    gpu: bool,
    made_with: MadeWith,
    make_engine: MakeEngine | None,
) -> Iterator[list[tuple[int, str, ResultLine]]]:
    """The results of all lines of `ranges`, in their order: number and digest of a line, and its result."""
    node_id = ray.get_runtime_context().get_node_id()
    actor: Any = ray.remote(Job).options(num_cpus=0, label_selector={"ray.io/node-id": node_id})
    job: Any = actor.remote(str(input.resolve()), ranges, config, replicas, gpu, made_with, make_engine)
    while (table := ray.get(job.next_results.remote())) is not None:
        for parcel in table["results"].to_pylist():
            yield [
                (row["number"], row["digest"], ResultLine(row["result"], row["failed"], row["tokens"]))
                for row in parcel
            ]
