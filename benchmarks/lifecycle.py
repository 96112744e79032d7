"""Does a server that loads and unloads the model again and again keep anything of it?

    python benchmarks/lifecycle.py --model demo/tiny-llama --output benchmarks/results/lifecycle.json

A cycle loads the model, serves, changes its configuration and loads it again (the server starts the new one before it
ends the old one), serves, and unloads it. Then what is left is counted: processes, file descriptors, threads and
memory of the server, and its shared memory.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from tritonclient import grpc

from nanoflow_backend.bench import result
from nanoflow_backend.commands.demo import stream_grpc
from nanoflow_backend.embedded.server import EmbeddedServer

FOLDER = Path(__file__).parents[1] / "model_repository" / "nanoflow"
UNKNOWN = 10**9
SETTLED_S = 60.0  # for an unload that the server has confirmed, to have happened


class Left(NamedTuple):
    processes: int
    threads: int
    file_descriptors: int
    shm_files: int
    shm_bytes: int
    rss_bytes: int


def main(
    model: Annotated[Path, typer.Option()],
    output: Annotated[Path | None, typer.Option()] = None,
    cycles: int = 50,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder)
        shutil.copytree(FOLDER, repository / "nanoflow")
        explicit = ["--model-control-mode=explicit"]
        with (
            EmbeddedServer(repository, arguments=explicit) as server,
            contextlib.closing(grpc.InferenceServerClient(server.grpc_url)) as client,
        ):
            before = left(server)
            expected = before._replace(threads=UNKNOWN, file_descriptors=UNKNOWN)  # the first client makes some
            seconds, counts = [], []
            for _ in range(cycles):
                start_s = time.perf_counter()
                for page_tokens in (16, 32):
                    engine = {"model": str(model.resolve()), "page_tokens": page_tokens}
                    (repository / "nanoflow" / "1" / "engine.json").write_text(json.dumps(engine))
                    client.load_model("nanoflow")
                    tokens = sum(new for _, new in stream_grpc(server.grpc_url, "def", max_tokens=16, ignore_eos=True))
                    assert tokens == 16, "every token arrived"
                client.unload_model("nanoflow")
                counts.append(settled(server, expected))
                expected = counts[0]
                seconds.append(time.perf_counter() - start_s)
    result.write(
        {
            "cycles": cycles,
            "engines_started": 2 * cycles,
            "seconds_per_cycle_mean": round(sum(seconds) / cycles, 2),
            "before": before._asdict(),
            **{f"after_{number}": counts[number - 1]._asdict() for number in milestones(cycles)},
            "most_after_the_first_cycle": Left(*map(max, zip(*counts[1:], strict=True)))._asdict(),
        },
        output,
    )


def milestones(cycles: int) -> list[int]:
    return sorted({1, 2, cycles // 5, cycles // 2, cycles} - {0})


def settled(server: EmbeddedServer, expected: Left) -> Left:
    """What is left once it is no more than expected: threads of the server's gRPC, for one, end a moment later.

    Raises: TimeoutError, where something does not go away.
    """
    deadline_s = time.monotonic() + SETTLED_S
    while True:
        now = left(server)
        if all(here <= there for here, there in zip(now[:-1], expected[:-1], strict=True)):  # memory is only recorded
            return now
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{SETTLED_S:g} s after the model was unloaded there are {now}, expected {expected}")
        time.sleep(0.05)


def left(server: EmbeddedServer) -> Left:
    processes = tree(server.pid)
    (pid,) = (pid for pid, name in processes.items() if name == "tritonserver")
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    shm_bytes = [file.stat().st_size for file in Path("/dev/shm").glob(f"{server.shm_prefix}*")]
    return Left(
        processes=len(processes),
        threads=int(status["Threads"]),
        file_descriptors=len(list(Path(f"/proc/{pid}/fd").iterdir())),
        shm_files=len(shm_bytes),
        shm_bytes=sum(shm_bytes),
        rss_bytes=1024 * int(status["VmRSS"].split()[0]),
    )


def tree(root: int) -> dict[int, str]:
    """The process and all that descend from it, with their names."""
    processes = {}
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # they end while we look
        processes[root] = Path(f"/proc/{root}/comm").read_text().strip()
        for task in Path(f"/proc/{root}/task").iterdir():
            for child in (task / "children").read_text().split():
                processes |= tree(int(child))
    return processes


if __name__ == "__main__":
    typer.run(main)
