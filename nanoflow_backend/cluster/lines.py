"""complete puts an EngineStage behind a dataset of lines; file_lines makes such a dataset of parts of a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import pyarrow as pa
import ray.data
from msgspec.structs import asdict

from nanoflow_backend.cluster.engine_stage import EngineStage, MakeEngine
from nanoflow_backend.cluster.parcels import PARCELS
from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.engine.settled_on import settled_on
from nanoflow_backend.offline.job_file import JobFile, LineRange
from nanoflow_backend.offline.made_with import MadeWith

LINES_PER_TASK = 64  # a task costs Ray some 10 ms of CPU time; what a lost node had begun is done again by the task
READERS = 1  # tasks without a CPU core would else all be started at once, each in a process of its own
RESTARTS = 20  # of one replica: lines that end every engine must not do so for ever


def complete(
    lines: ray.data.Dataset,
    config: EngineConfig,
    replicas: int,
    gpu: bool,
    stage: type[EngineStage] = EngineStage,
    batch_size: int = LINES_PER_TASK,
    made_with: MadeWith | None = None,
    make_engine: MakeEngine | None = None,
) -> ray.data.Dataset:
    """Complete each row of `lines` on one of `replicas` engines; see EngineStage for the columns of both.

    Args:
        lines: a block is what a lost engine has to do again, and its batches follow one another: cut large ones with
            `repartition(target_num_rows_per_block=64)`, which needs a CPU core that no engine has.
        gpu: each engine has `config.tensor_parallel` GPUs of its own; else as many CPU cores.
        made_with: see EngineStage, as for `make_engine`.
    """
    ranks, calls = config.tensor_parallel, concurrent_calls(config, gpu)
    return lines.map_batches(
        stage,
        fn_constructor_args=(config, made_with, make_engine),
        batch_size=batch_size,
        batch_format="pyarrow",
        num_cpus=1 if gpu else ranks,
        num_gpus=ranks if gpu else 0,
        max_restarts=RESTARTS,
        max_task_retries=-1,  # one loss of a node takes several: Ray tries the old address until it knows better
        compute=ray.data.ActorPoolStrategy(
            size=replicas,
            max_concurrent_calls_per_actor=calls,
            max_tasks_in_flight_per_actor=calls + 1,
            enable_true_multi_threading=True,
        ),
    )


def concurrent_calls(config: EngineConfig, gpu: bool) -> int:
    """Tasks that an engine has at a time: as many lines as it runs, and some that wait."""
    running = settled_on("cuda" if gpu else "cpu", config).max_running
    return -(-running // LINES_PER_TASK) + 2


def file_parcels(file: JobFile, ranges: Sequence[LineRange], node_id: str) -> ray.data.Dataset:
    """The lines of these ranges, which node `node_id` reads, as rows of PARCELS."""

    def read(batch: pa.Table) -> Iterator[pa.Table]:
        for row in batch.to_pylist():
            numbered = file.read(LineRange(**row))
            while parcel := list(islice(numbered, LINES_PER_TASK)):
                yield pa.table([[parcel[0][0]], [[text for _, text in parcel]]], schema=PARCELS)

    rows = [asdict(part) for part in ranges]
    return ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        read,
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=0,  # engines may have taken all
        label_selector={"ray.io/node-id": node_id},
        compute=ray.data.TaskPoolStrategy(size=READERS),
    )
