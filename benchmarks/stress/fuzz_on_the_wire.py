"""The request surface is fuzzed through the real server: gRPC messages, some of them mangled, and HTTP bodies."""

from __future__ import annotations

import http.client
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from tritonclient.grpc.service_pb2 import ModelInferRequest

from benchmarks.server import serve_model
from benchmarks.serving.grpc_streams import GrpcStreams
from benchmarks.stress.fuzz_in_process import SETTINGS, tiny_checkpoint
from benchmarks.stress.request_surface import JSON, FuzzRequest, cases
from nanoflow_backend.embedded.server import EmbeddedServer
from nanoflow_backend.serving.tensors import INPUTS

PATIENCE_S = 60.0
TYPES = {tensor.name: "BYTES" if tensor.type == "STRING" else tensor.type for tensor in INPUTS}
CANARY = {"text_input": "the quick brown fox", "temperature": 0, "max_tokens": 8, "ignore_eos": True}
# What the server's log has where the model met what it did not expect, and answered INTERNAL.
OURS = ("a request broke", "a reply broke", "Traceback")


@st.composite
def messages(draw: st.DrawFn) -> ModelInferRequest:
    """A request as it goes over gRPC; one in ten has a wrong type, name, size or number of contents."""
    message = grpc_message(draw(cases(shapes_are_declared=False)))
    if message.inputs and draw(st.integers(0, 9)) == 0:
        index = draw(st.integers(0, len(message.inputs) - 1))
        match draw(st.integers(0, 3)):
            case 0:
                message.inputs[index].datatype = draw(st.sampled_from(["BYTES", "INT32", "FP64", "BOOL", "none"]))
            case 1:
                message.inputs[index].name = draw(st.text(max_size=5))
            case 2:
                message.raw_input_contents[index] = draw(st.binary(max_size=12))
            case 3:
                del message.raw_input_contents[index]
    return message


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, bytes]:
    """(endpoint, body) of an HTTP request: a case's own values, or any JSON in their place, or no JSON at all."""
    case = draw(cases(shapes_are_declared=False))
    body: dict[str, Any] = {name: http_value(array) for name, array in case.tensors.items()}
    body |= case.parameters | ({"timeout": case.timeout_us} if case.timeout_us else {})
    if draw(st.integers(0, 4)) == 0:
        body[draw(st.sampled_from(list(TYPES)))] = draw(JSON)
    text = json.dumps(body).encode()
    if draw(st.integers(0, 19)) == 0:
        text = text[: draw(st.integers(0, len(text)))]
    return draw(st.sampled_from(["generate", "generate_stream"])), text


def grpc_message(case: FuzzRequest) -> ModelInferRequest:
    message = ModelInferRequest(model_name="nanoflow")
    message.parameters["triton_enable_empty_final_response"].bool_param = True
    for name, value in {**case.parameters, "timeout": case.timeout_us}.items():
        parameter = message.parameters[name.encode(errors="replace").decode()]
        if isinstance(value, bool):
            parameter.bool_param = value
        elif isinstance(value, int) and -(2**63) <= value < 2**63:
            parameter.int64_param = value
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            parameter.string_param = text.encode(errors="replace").decode()
    for name, array in case.tensors.items():
        message.inputs.add(name=name, datatype=TYPES[name], shape=array.shape)
        message.raw_input_contents.append(raw(array))
    for name in case.outputs:
        message.outputs.add(name=name)
    return message


def raw(array: Any) -> bytes:
    if array.dtype != np.object_:
        return array.tobytes()
    return b"".join(len(item).to_bytes(4, "little") + item for item in array.ravel())


def http_value(array: Any) -> Any:
    return [item.decode(errors="replace") if isinstance(item, bytes) else item for item in array.ravel().tolist()]


@contextmanager
def fuzzed_server(folder: Path) -> Iterator[Wire]:
    """A client of a server with a tiny checkpoint behind the drop-in folder; both files and log lie in `folder`."""
    log = folder / "server.log"
    with serve_model(tiny_checkpoint(folder), log=log, **SETTINGS) as server, closing(Wire(server, log)) as wire:
        yield wire


class Wire:
    """A client of one server, which checks after each batch that nothing of it is left."""

    def __init__(self, server: EmbeddedServer, log: Path, streams: int = 8) -> None:
        self._server, self._log, self._read_bytes = server, log, 0
        self._grpc = GrpcStreams(server.grpc_url)
        self._streams = [self._grpc.open() for _ in range(streams)]
        self._expected = self._canary()

    def close(self) -> None:
        self._grpc.disconnect()

    def check_grpc(self, batch: Sequence[ModelInferRequest]) -> Counter[str]:
        """Send at most `streams` messages at once; returns how many were answered and how many refused.

        Raises:
            AssertionError: one has no final response, the model broke, or the next request is not served as before.
        """
        open_, ends = dict(zip(self._streams, batch, strict=False)), Counter[str]()
        for stream, message in open_.items():
            self._grpc.send(stream, message)
        for stream, answer in self._grpc.receive(time.monotonic() + PATIENCE_S):
            if answer.error_message or answer.infer_response.parameters["triton_final_response"].bool_param:
                del open_[stream]
                ends["refused" if answer.error_message else "answered"] += 1
                if not open_:
                    break
        assert not open_, f"no final response to {list(open_.values())}"
        self._check_server(batch)
        return ends

    def check_http(self, batch: Sequence[tuple[str, bytes]]) -> Counter[str]:
        """Send requests one after the other; as above."""
        ends: Counter[str] = Counter()
        for endpoint, body in batch:
            status, text = self._post(endpoint, body)
            assert status in (200, 400, 500), f"{status} {text}: {endpoint} {body!r}"
            ends["answered" if status == 200 and b'"error"' not in text else "refused"] += 1
        self._check_server(batch)
        return ends

    def _check_server(self, batch: Sequence[Any]) -> None:
        with self._log.open("rb") as log:
            log.seek(self._read_bytes)
            news = log.read()
        self._read_bytes += len(news)
        broken = [line for line in news.decode(errors="replace").splitlines() if any(word in line for word in OURS)]
        assert not broken, f"{broken}: {batch}"
        assert self._canary() == self._expected, f"disturbed by {batch}"

    def _canary(self) -> tuple[int, bytes]:
        return self._post("generate", json.dumps(CANARY).encode())

    def _post(self, endpoint: str, body: bytes) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self._server.http_url, timeout=PATIENCE_S)
        try:
            connection.request("POST", f"/v2/models/nanoflow/{endpoint}", body)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()
