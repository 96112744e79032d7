"""Responses stream through tritonserver from an engine whose program does nothing: what does one cost end to end?

Client, server, stub and engine share the machine's cores. Every response has the text and the ids of its tokens, and an
id tells when its token was made: `delay_ms` is from the engine's host to the client's.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import msgspec
import numpy as np
import tritonclient.grpc
import typer
from tritonclient.grpc.service_pb2 import ModelInferRequest

from benchmarks.engine import null_engine
from benchmarks.server import DEMO_MODEL, add_model
from benchmarks.serving import server_state
from benchmarks.serving.grpc_streams import GrpcStreams
from nanoflow_backend.bench import result
from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.embedded.server import EmbeddedServer
from nanoflow_backend.engine import LLM, Engine, SamplingParams

PARAMS = {"max_tokens": 512, "temperature": 0, "ignore_eos": True}
DRAIN_S = 60.0
SETTINGS = {"dense_batch_tokens": 1024, "max_running": 512, "kv_cache_tokens": 512 * 600}


def main(
    output: Annotated[Path | None, typer.Option(help="Where the JSON result goes; default: standard output.")] = None,
    model: Annotated[Path, typer.Option(help="Hugging Face folder.")] = DEMO_MODEL,
    duration_s: Annotated[float, typer.Option(help="That is measured, each.")] = 8.0,
    warm_up_s: float = 2.0,
    concurrency: Annotated[str, typer.Option(help="Streams at once.")] = "1,4,16,64,256",
    step_us: Annotated[
        str, typer.Option(help="How long steps take; 0: as fast as the engine can.")
    ] = "0,1500,2000,3000,4000,8000",
) -> None:
    """What a streamed response costs: gRPC streams of an engine whose program does nothing, behind tritonserver."""
    load_before = os.getloadavg()[0]
    numbers, steps = ([int(number) for number in text.split(",")] for text in (concurrency, step_us))
    alone = {streams: engine_tokens_per_s(model, streams) for streams in numbers}
    rows = []
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), model, steps) as (server, admin):
        for step in steps:
            admin.load_model(f"step_{step}")
            for streams in numbers:
                measured = served(server, f"step_{step}", streams, duration_s, warm_up_s)
                rows.append({"streams": streams, "step_us": step, **measured})
                print(rows[-1], flush=True)
            admin.unload_model(f"step_{step}")
            while admin.is_model_ready(f"step_{step}"):
                time.sleep(0.1)
    result.write(
        {
            "max_tokens": PARAMS["max_tokens"],
            "seconds_each": duration_s,
            "load_average_before": round(load_before, 2),
            "engine_tokens_per_s": alone,
            "served": rows,
        },
        output,
    )


def engine_tokens_per_s(model: Path, streams: int) -> int:
    """The engine in this process, `streams` requests at once."""
    config = EngineConfig.resolve({"model": str(model), "device": "cpu", **SETTINGS}, relative_to=Path.cwd())
    alone = LLM(Engine(config, make_executor=partial(null_engine.NullExecutor, step_us=0)))
    prompts = [[3 + number] * 8 for number in range(streams)]
    params = SamplingParams(**PARAMS)
    alone.generate(prompts, SamplingParams(max_tokens=64, ignore_eos=True))
    start = time.perf_counter()
    tokens = sum(len(completion.token_ids) for completion in alone.generate(prompts, params))
    return round(tokens / (time.perf_counter() - start))


@contextmanager
def serving(folder: Path, model: Path, steps_us: list[int]) -> Iterator[tuple[EmbeddedServer, Any]]:
    """A server with one model for each step time, none of them loaded."""
    repository = folder / "repository"
    for step in steps_us:
        name = f"step_{step}"
        python = null_engine.write_interpreter(folder / name, step)
        add_model(repository, model, name=name, python=str(python), device="cpu", **SETTINGS)
    with EmbeddedServer(repository, arguments=["--model-control-mode=explicit"]) as server:
        admin = tritonclient.grpc.InferenceServerClient(server.grpc_url)
        yield server, admin
        admin.close()


def served(server: EmbeddedServer, model: str, streams: int, duration_s: float, warm_up_s: float) -> dict[str, Any]:
    """`streams` requests at once, each followed by the next, for `duration_s` after a warm-up."""
    sizes: list[int] = []
    delays_ms: list[int] = []
    with GrpcStreams(server.grpc_url) as client:
        live = {client.open() for _ in range(streams)}
        for stream in live:
            client.send(stream, request(model, stream))
        begin_s = time.monotonic() + warm_up_s
        list(receive(client, model, begin_s))
        before = cpu_with_client_s(server)
        for ids in receive(client, model, begin_s + duration_s):
            sizes.append(len(ids))
            delays_ms += [null_engine.age_ms(i) for i in ids]
        used = {name: value - before[name] for name, value in cpu_with_client_s(server).items()}
        drain(client, live)
    return {
        "tokens_per_s": round(sum(sizes) / duration_s),
        "responses_per_s": round(len(sizes) / duration_s),
        "tokens_per_response_median": median(sizes),
        "delay_ms_p50": round(float(np.percentile(delays_ms, 50)), 1),
        "delay_ms_p99": round(float(np.percentile(delays_ms, 99)), 1),
        "cpu_us_per_response": {name: round(1e6 * value / len(sizes)) for name, value in used.items()},
    }


def cpu_with_client_s(server: EmbeddedServer) -> dict[str, float]:
    return {"client": time.process_time(), **server_state.cpu_s(server)}


def receive(client: GrpcStreams, model: str, until_s: float) -> Iterator[list[int]]:
    """The token ids of each response. A request that has ended is followed by the next one."""
    for stream, answer in client.receive(until_s):
        assert not answer.error_message, answer.error_message
        response = answer.infer_response
        yield np.frombuffer(response.raw_output_contents[index_of(response, "output_ids")], np.int32).tolist()
        if response.parameters["triton_final_response"].bool_param:
            client.send(stream, request(model, stream))


def drain(client: GrpcStreams, live: set[int]) -> None:
    """To the end of every request: so a client should leave (examples/README.md)."""
    waiting = set(live)
    for stream, answer in client.receive(time.monotonic() + DRAIN_S):
        if answer.infer_response.parameters["triton_final_response"].bool_param:
            waiting.discard(stream)
        if not waiting:
            return
    raise TimeoutError(f"{len(waiting)} requests did not end")


def index_of(response: Any, name: str) -> int:
    return next(index for index, output in enumerate(response.outputs) if output.name == name)


def request(model: str, stream: int, params: Mapping[str, Any] = PARAMS) -> ModelInferRequest:
    made = ModelInferRequest(model_name=model, id=str(stream))
    made.parameters["triton_enable_empty_final_response"].bool_param = True
    text = f"The {stream}th statement".encode()
    for name, kind, content in (
        ("text_input", "BYTES", with_length(text)),
        ("stream", "BOOL", b"\1"),
        ("return_output_ids", "BOOL", b"\1"),
        ("sampling_parameters", "BYTES", with_length(msgspec.json.encode(params))),
    ):
        made.inputs.add(name=name, datatype=kind, shape=[1])
        made.raw_input_contents.append(content)
    return made


def with_length(content: bytes) -> bytes:
    return len(content).to_bytes(4, "little") + content
