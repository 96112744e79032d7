"""A server that loads and unloads a model again and again must keep nothing of it.

A cycle loads the model, serves, changes its configuration and loads it again (the server starts the new one before it
ends the old one), serves, and unloads it. Then what is left is counted: processes, file descriptors, threads and
memory of the server, and its shared memory.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from tritonclient import grpc

from benchmarks.server import serve_model, write_engine_json
from benchmarks.serving import server_state
from nanoflow_backend.bench import result
from nanoflow_backend.commands.demo import stream_grpc
from nanoflow_backend.embedded.server import EmbeddedServer

UNKNOWN = 10**9
SETTLED_S = 60.0  # for an unload that the server has confirmed, to have happened


# Names of the threads that gRPC starts and ends by a clock of its own, minutes after a call (tritonserver 2.51).
GRPC_THREADS = {"default-executo", "event_engine", "grpc_global_tim", "resolver-execut", "timer_manager"}


class Left(NamedTuple):
    """What a server and its processes hold."""

    processes: int
    threads: int  # of the server, but gRPC's own
    file_descriptors: int
    shm_files: int
    shm_bytes: int
    rss_bytes: int


def main(
    model: Annotated[Path, typer.Option(help="Hugging Face folder.")],
    output: Annotated[Path | None, typer.Option(help="Where the JSON result goes; default: standard output.")] = None,
    cycles: int = 50,
) -> None:
    """What loads, reloads and unloads of a model leave behind: processes, threads, descriptors, memory."""
    with (
        serve_model(model, arguments=["--model-control-mode=explicit"]) as server,
        contextlib.closing(grpc.InferenceServerClient(server.grpc_url)) as client,
    ):
        before = left(server)
        expected = before._replace(threads=UNKNOWN, file_descriptors=UNKNOWN)  # the first client makes some
        seconds, counts = [], []
        for _ in range(cycles):
            start_s = time.perf_counter()
            for page_tokens in (16, 32):
                write_engine_json(server.model_repository / "nanoflow", model, page_tokens=page_tokens)
                client.load_model("nanoflow")
                tokens = sum(new for _, new in stream_grpc(server.grpc_url, "def", max_tokens=16, ignore_eos=True))
                assert tokens == 16, "every token arrived"
            client.unload_model("nanoflow")
            counts.append(at_rest(server, expected))
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


def at_rest(server: EmbeddedServer, expected: Left) -> Left:
    """What is left once it is no more than expected: descriptors of the server's gRPC, for one, close a moment later.

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


def read_name(file: Path) -> str | None:
    """A thread's name. None: it has ended meanwhile."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return file.read_text().strip()
    return None


def left(server: EmbeddedServer) -> Left:
    (pid,) = server_state.by_role(server)["tritonserver"]
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    threads = [read_name(task / "comm") for task in Path(f"/proc/{pid}/task").iterdir()]
    shm_bytes = [file.stat().st_size for file in Path("/dev/shm").glob(f"{server.shm_prefix}*")]
    return Left(
        processes=len(server_state.processes(server.pid)),
        threads=sum(name is not None and name not in GRPC_THREADS for name in threads),
        file_descriptors=len(list(Path(f"/proc/{pid}/fd").iterdir())),
        shm_files=len(shm_bytes),
        shm_bytes=sum(shm_bytes),
        rss_bytes=1024 * int(status["VmRSS"].split()[0]),
    )
