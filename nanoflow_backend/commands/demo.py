"""`nanoflow demo` walks the whole path once: server, model, a gRPC stream, an HTTP stream, and a clean end."""

from __future__ import annotations

import json
import queue
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy
from rich.console import Console
from tritonclient import grpc

from nanoflow_backend.embedded.server import EmbeddedServer

MAX_TOKENS = 64


def demo(model_repository: Path, prompt: str, *, http_port: int, grpc_port: int, metrics_port: int) -> None:
    """Start the server, stream one completion over gRPC and one over HTTP, and stop it."""
    console = Console(highlight=False)
    server = EmbeddedServer(model_repository, http_port=http_port, grpc_port=grpc_port, metrics_port=metrics_port)
    console.print("starting Triton Inference Server ...", style="dim")
    with server:
        for name, pieces in (
            ("gRPC, tritonclient", stream_grpc(server.grpc_url, prompt, max_tokens=MAX_TOKENS, temperature="0")),
            ("HTTP, generate_stream", stream_http(server.http_url, prompt)),
        ):
            console.print(f"\n[bold]{name}[/bold]")
            _show(console, prompt, pieces)
    console.print("\nstopped; nothing is left running", style="dim")


def _show(console: Console, prompt: str, pieces: Iterator[tuple[str, int]]) -> None:
    """Print the text as it comes, then the rate."""
    start, tokens = time.perf_counter(), 0
    console.print(prompt, end="", style="dim", markup=False)
    for text, new_tokens in pieces:
        console.print(text, end="", markup=False, soft_wrap=True)
        tokens += new_tokens
    seconds = time.perf_counter() - start
    console.print(f"\n{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.0f} tokens/s", style="green")


def stream_grpc(url: str, prompt: str, **parameters: int | str) -> Iterator[tuple[str, int]]:
    """(text, number of new tokens) of each response. Parameters over gRPC have no floats: those are strings.

    Raises: RuntimeError, the server answered with an error.
    """
    inputs = [
        tensor("text_input", "BYTES", numpy.array([prompt.encode()], dtype=object)),
        tensor("stream", "BOOL", numpy.array([True])),
        tensor("return_num_output_tokens", "BOOL", numpy.array([True])),
    ]
    responses: queue.SimpleQueue[tuple[grpc.InferResult | None, Exception | None]] = queue.SimpleQueue()
    client = grpc.InferenceServerClient(url)
    client.start_stream(lambda result, error: responses.put((result, error)))
    client.async_stream_infer("nanoflow", inputs, parameters=parameters, enable_empty_final_response=True)
    while True:
        result, error = responses.get()
        if error is not None or result is None:
            raise RuntimeError(f"the server answered: {error}")
        response = result.get_response()
        if response.outputs:
            yield result.as_numpy("text_output")[0].decode(), int(result.as_numpy("num_output_tokens")[0])
        if response.parameters["triton_final_response"].bool_param:
            break
    client.stop_stream()
    client.close()


def tensor(name: str, datatype: str, values: numpy.ndarray) -> grpc.InferInput:
    made = grpc.InferInput(name, list(values.shape), datatype)
    made.set_data_from_numpy(values)
    return made


def stream_http(url: str, prompt: str) -> Iterator[tuple[str, int]]:
    """The same from server-sent events. Raises: RuntimeError, the server answered with an error."""
    fields = {"text_input": prompt, "stream": True, "max_tokens": MAX_TOKENS, "temperature": 0}
    request = urllib.request.Request(
        f"http://{url}/v2/models/nanoflow/generate_stream",
        data=json.dumps({**fields, "return_num_output_tokens": True}).encode(),
    )
    with urllib.request.urlopen(request) as events:
        for line in events:
            if line.startswith(b"data: "):
                event = json.loads(line.removeprefix(b"data: "))
                if "error" in event:
                    raise RuntimeError(f"the server answered: {event['error']}")
                yield event["text_output"], event["num_output_tokens"]
