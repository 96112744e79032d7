"""An offline workload goes through the real tritonserver, to see what is left of the engine's rate.

Runs in the server's Python, which needs no torch: `--set python=` names the engine's. Each client is a process with one
gRPC stream, which carries its share of the requests, all sent at once. Prompts are those of `nanoflow bench offline`.
"""

from __future__ import annotations

import json
import multiprocessing
import queue
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput

from benchmarks.server import serve_model
from benchmarks.serving.server_state import cpu_s
from nanoflow_backend.bench import result, workload
from nanoflow_backend.commands.settings import parse
from nanoflow_backend.embedded.server import EmbeddedServer
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.runtime.gpu_meter import find_gpu_meter

READY_TIMEOUT_S = 600.0  # weights, and a capture of every size of step
PATIENCE_S = 600.0  # between two responses to one client: the last requests wait for those before them
WARM_UP = (16, 4)  # tokens in and out of the one request that each client sends before the others


class StreamedRequest(NamedTuple):
    prompt: np.ndarray  # int32
    output_tokens: int


class Received(NamedTuple):
    """By one client."""

    first_token_s: list[float]  # of each request, after the start
    ended_s: float  # of time.perf_counter(), which all processes share
    responses: int


def main(
    model: Annotated[Path, typer.Option(help="Hugging Face folder.")],
    output: Annotated[Path | None, typer.Option(help="Where the JSON result goes; default: standard output.")] = None,
    input_tokens: int = 1024,
    output_tokens: int = 512,
    requests: int = 1500,
    clients: Annotated[int, typer.Option(help="Processes.")] = 8,
    engine_result: Annotated[
        Path | None, typer.Option(help="Of `nanoflow bench offline` with this workload, to compare with.")
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="A field of engine.json.")] = None,
) -> None:
    """An offline workload through tritonserver, as gRPC streams of token ids: what of the engine's rate is left?"""
    work = workload.constant(input_tokens, output_tokens, requests)
    alone = json.loads(engine_result.read_text()) if engine_result else None
    if alone and (alone["workload"], alone["requests"]) != (work.name, requests):
        raise SystemExit(f"{engine_result}: expected {requests} requests of {work.name}, got {alone['requests']} "
                         f"of {alone['workload']}")  # fmt: skip
    fields = {"max_queue_size": max(requests, 4096), **parse(settings or [])}
    vocab_size = read_model_config(model).vocab_size
    jobs = [
        StreamedRequest(np.array(prompt, np.int32), length)
        for prompt, (_, length) in zip(work.prompts(vocab_size), work.lengths, strict=True)
    ]
    with serve_model(model, ready_timeout_s=READY_TIMEOUT_S, **fields) as server:
        measured = measure_clients(server, jobs, clients)
    total = (work.input_tokens + work.output_tokens) / measured["wall_s"]
    result.write(
        {
            "workload": work.name,
            "model": model.name,
            "engine": "nanoflow behind tritonserver",
            "schedule": fields.get("schedule", "sequential"),
            "settings": result.without_folders({"model": model.name, **fields}),
            "requests": requests,
            "clients": clients,
            "input_tokens": work.input_tokens,
            "output_tokens": work.output_tokens,
            "total_tokens_per_s": round(total, 1),
            "output_tokens_per_s": round(work.output_tokens / measured["wall_s"], 1),
            **measured,
            **({"share_of_engine": round(total / alone["total_tokens_per_s"], 4)} if alone else {}),
        },
        output,
    )


def measure_clients(server: EmbeddedServer, jobs: Sequence[StreamedRequest], clients: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
    start = context.Barrier(clients + 1, timeout=PATIENCE_S)
    meter = find_gpu_meter()
    with context.Pool(clients, _share, (start,)) as pool:
        running = pool.starmap_async(run_client, [(server.grpc_url, jobs[n::clients]) for n in range(clients)], 1)
        start.wait()
        begin_s, cpu_before, before = time.perf_counter(), cpu_s(server), meter.read() if meter else None
        received: list[Received] = running.get()
        after = meter.read() if meter else None
    used_s = {name: spent - cpu_before[name] for name, spent in cpu_s(server).items()}
    wall_s = max(client.ended_s for client in received) - begin_s
    first_token_s = sorted(at for client in received for at in client.first_token_s)
    responses = sum(client.responses for client in received)
    found: dict[str, Any] = {
        "wall_s": round(wall_s, 3),
        "tokens_per_response": round(sum(job.output_tokens for job in jobs) / responses, 2),
        "first_token_s_median": round(float(np.median(first_token_s)), 3),
        "cpu_cores_used": {name: round(seconds / wall_s, 2) for name, seconds in used_s.items()},
    }
    if meter and before and after:
        energy_j = after.energy_j - before.energy_j
        tokens = sum(len(job.prompt) + job.output_tokens for job in jobs)
        found["device"] = meter.name
        found["mean_power_w"] = round(energy_j / (after.time_s - before.time_s), 1)
        found["mj_per_token"] = round(1e3 * energy_j / tokens, 3)
    return found


def _share(barrier: Barrier) -> None:
    global _start
    _start = barrier


def run_client(url: str, jobs: Sequence[StreamedRequest]) -> Received:
    """All jobs at once on one stream, when every client is ready.

    Raises:
        RuntimeError: the server answered with an error, or with another number of tokens than was asked for.
    """
    responses: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    with InferenceServerClient(url) as client:
        client.start_stream(lambda result, error: responses.put((result, error)))
        warm_up = StreamedRequest(np.arange(WARM_UP[0], dtype=np.int32), WARM_UP[1])
        run_jobs(client, responses, [warm_up])
        _start.wait()
        return run_jobs(client, responses, jobs)


def run_jobs(
    client: InferenceServerClient, responses: queue.SimpleQueue[tuple[Any, Any]], jobs: Sequence[StreamedRequest]
) -> Received:
    begin_s, ended_s, count = time.perf_counter(), 0.0, 0
    for number, job in enumerate(jobs):
        client.async_stream_infer(
            "nanoflow",
            [_tensor("input_ids", "INT32", job.prompt), _tensor("stream", "BOOL", np.array([True]))],
            request_id=str(number),
            outputs=[InferRequestedOutput("output_ids")],
            parameters={"max_tokens": job.output_tokens, "ignore_eos": True, "temperature": "0"},
            enable_empty_final_response=True,
        )
    tokens: Counter[str] = Counter()
    first_token_s: dict[str, float] = {}
    live = len(jobs)
    while live:
        result, error = responses.get(timeout=PATIENCE_S)
        if error is not None:
            raise RuntimeError(f"the server answered: {error}")
        response, ended_s = result.get_response(), time.perf_counter()
        live -= response.parameters["triton_final_response"].bool_param
        if response.outputs:
            count += 1
            tokens[response.id] += response.outputs[0].shape[0]
            first_token_s.setdefault(response.id, ended_s - begin_s)
    for number, job in enumerate(jobs):
        if tokens[str(number)] != job.output_tokens:
            raise RuntimeError(f"a request got {tokens[str(number)]} tokens, expected {job.output_tokens}")
    return Received(list(first_token_s.values()), ended_s, count)


def _tensor(name: str, datatype: str, values: np.ndarray) -> InferInput:
    made = InferInput(name, list(values.shape), datatype)
    made.set_data_from_numpy(values)
    return made
