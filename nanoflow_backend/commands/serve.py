"""`nanoflow serve` starts the real server on this model repository and says what to try."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape

from nanoflow_backend.embedded.server import EmbeddedServer
from nanoflow_backend.offline.output import check_output
from nanoflow_backend.process import logs

WARNINGS_PERIOD_S = 0.5


def serve(
    model_repository: Path,
    *,
    http_port: int,
    grpc_port: int,
    metrics_port: int,
    log: Path | None,
    log_format: Literal["text", "json"] | None,
) -> None:
    """Raises: ServerError, as EmbeddedServer does; ConfigError for a log that cannot be written."""
    if log:
        check_output(log)
    if log_format:
        os.environ[logs.FORMAT] = log_format  # the server and all that it starts inherit it
    console = Console(highlight=False)
    server = EmbeddedServer(
        model_repository, http_port=http_port, grpc_port=grpc_port, metrics_port=metrics_port, log=log
    )
    with console.status("starting Triton Inference Server"):
        server.start()
        try:
            server.wait_until_ready(server.ready_timeout_s)
        except BaseException:
            server.stop()
            raise
    console.print(escape(commands_to_try(server)), soft_wrap=True)  # a wrapped command cannot be pasted
    with contextlib.suppress(KeyboardInterrupt):
        try:
            while True:
                for line in server.new_warnings():
                    console.print(line, style="yellow", markup=False, soft_wrap=True)
                server.wait(WARNINGS_PERIOD_S)
        finally:
            server.stop()
    console.print("stopped")


def commands_to_try(server: EmbeddedServer) -> str:
    """Return commands that work against this server, to be pasted into a shell."""
    url = f"http://{server.http_url}/v2/models/nanoflow"
    body = """'{"text_input": "Write a string", "max_tokens": 32, "temperature": 0}'"""
    stream = """'{"text_input": "Write a string", "max_tokens": 32, "temperature": 0, "stream": true}'"""
    return f"""\
Ready: HTTP {server.http_url}, gRPC {server.grpc_url}, metrics {server.metrics_url}/metrics. Ctrl-C stops it. Try:

curl -s {url}/generate -d {body}
curl -sN {url}/generate_stream -d {stream}

from tritonclient.grpc import InferenceServerClient, InferInput
import numpy
client = InferenceServerClient("{server.grpc_url}")
text = InferInput("text_input", [1], "BYTES")
text.set_data_from_numpy(numpy.array([b"Write a string"], dtype=object))
stream = InferInput("stream", [1], "BOOL")
stream.set_data_from_numpy(numpy.array([True]))
client.start_stream(lambda result, error: print(error or result.as_numpy("text_output")[0].decode(), end=""))
client.async_stream_infer("nanoflow", [text, stream], parameters={{"max_tokens": 32}})
client.stop_stream()  # waits for the end of the stream
"""
