"""complete_on_cluster brings the results of a job's lines to their end, on engines all over a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from nanoflow_backend.cluster.connection import connect
from nanoflow_backend.cluster.error import ClusterError
from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.engine.settled_on import settled_on
from nanoflow_backend.offline.job_file import JobFile
from nanoflow_backend.offline.made_with import MadeWith
from nanoflow_backend.offline.result_file import ResultFile

if TYPE_CHECKING:
    from nanoflow_backend.engine import Engine

MOST_RANGES, LEAST_LINES = 512, 1024  # of the input, for each of which Ray Data has a row at once; and of each


def complete_on_cluster(
    jobs: JobFile,
    config: EngineConfig,
    results: ResultFile,
    address: str,
    replicas: int,
    make_engine: Callable[[EngineConfig], Engine] | None = None,
) -> Iterator[None]:
    """Put a result for each line that has none; yields after each few.

    Args:
        address: see `connect`.
        replicas: engines; each has GPUs of its own if the cluster has any, else CPU cores.
        make_engine: what makes an engine of a configuration; None: Engine.

    Raises:
        ConfigError: naming what is wrong with the address, the configuration or a file, or what there is no room for.
        ClusterError: the cluster cannot complete the lines.
    """
    total = jobs.count()
    if total is None:
        raise ConfigError(f"{jobs.path}: expected a regular file with --cluster, whose parts are read apart")
    if config.gpus is not None:
        raise ConfigError(f"gpus: expected none with --cluster, for Ray chooses them, got {list(config.gpus)}")
    ray = connect(address)
    try:
        gpu = config.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
        if config.device == "cuda" and not gpu:
            raise ConfigError("device: expected cpu or auto, got cuda: no node of the cluster has a GPU")
        check_room(ray.nodes(), replicas, config.tensor_parallel, "GPU" if gpu else "CPU")
        made_with = MadeWith.of(settled_on("cuda" if gpu else "cpu", config))
        results.resume(jobs.lines(), made_with)
        lines_each = max(LEAST_LINES, -(-total // MOST_RANGES))
        if ranges := jobs.ranges(results.lines, lines_each):
            from nanoflow_backend.cluster.job import results_of

            for rows in results_of(jobs.path, ranges, config, replicas, gpu, made_with, make_engine):
                for number, digest, _ in rows:
                    results.expect(number, digest)
                for number, _, result in rows:
                    results.put(number, result)
                yield
    except (ray.exceptions.RayError, ConnectionError) as error:
        raise ClusterError.of(error) from None
    finally:
        ray.shutdown()


def check_room(nodes: Sequence[dict[str, Any]], replicas: int, each: int, resource: str) -> None:
    """Raises: ConfigError, where `replicas` engines with `each` of the resource, on one node each, find no place."""
    amounts = [int(node["Resources"].get(resource, 0)) for node in nodes if node["Alive"]]
    room = sum(amount // each for amount in amounts)
    if room < replicas:
        raise ConfigError(
            f"replicas: expected at most {room}, got {replicas}: each takes {each} {resource} of one node, "
            f"and the nodes have {', '.join(map(str, sorted(amounts)))}"
        )
