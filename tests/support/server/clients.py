"""Clients of a served model, as small as its users' own."""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import re
import socket
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import tritonclient.grpc
from support.waiting import until
from tritonclient.utils import InferenceServerException

from nanoflow_backend.serving.tensors import INPUTS

NUMPY = {"STRING": np.object_, "BOOL": np.bool_, "INT32": np.int32}
TYPES = {t.name: t.type for t in INPUTS}
PATIENCE_S = 120  # nothing here takes longer


def tensors(**inputs: Any) -> list[tritonclient.grpc.InferInput]:
    made = []
    for name, value in inputs.items():
        array = np.atleast_1d(np.asarray(value, dtype=NUMPY[TYPES[name]]))
        wire_type = "BYTES" if TYPES[name] == "STRING" else TYPES[name]
        made.append(tritonclient.grpc.InferInput(name, list(array.shape), wire_type).set_data_from_numpy(array))
    return made


class GrpcStream:
    """One request on a stream of its own. Iterate over its responses (dicts), or cancel it."""

    def __init__(
        self, url: str, model: str, *, outputs=None, parameters=None, timeout_us=None, request_id="", **inputs: Any
    ):
        self.responses: queue.Queue[Any] = queue.Queue()
        self.client = tritonclient.grpc.InferenceServerClient(url)
        # Errors have their message only: the header that adds their code (triton_grpc_error) is not for server 2.51.
        self.client.start_stream(lambda result, error: self.responses.put(error or result))
        self.client.async_stream_infer(
            model,
            tensors(**inputs),
            outputs=outputs and [tritonclient.grpc.InferRequestedOutput(name) for name in outputs],
            parameters=parameters,
            timeout=timeout_us,
            request_id=request_id,
            enable_empty_final_response=True,
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Raises: InferenceServerException."""
        final = False
        while not final:
            response = self.responses.get(timeout=PATIENCE_S)
            if isinstance(response, InferenceServerException):
                raise response
            message = response.get_response()
            final = message.parameters["triton_final_response"].bool_param
            arrays = {output.name: response.as_numpy(output.name) for output in message.outputs}
            assert arrays, "a response without outputs"
            yield {name: plain(array) for name, array in arrays.items()}

    def close(self, cancel: bool = False) -> None:
        self.client.stop_stream(cancel_requests=cancel)
        self.client.close()


def plain(array: np.ndarray) -> Any:
    """As the server's HTTP endpoint writes it: one element as a scalar, else a list."""
    values = [value.decode() if isinstance(value, bytes) else value for value in array.ravel().tolist()]
    return values[0] if len(values) == 1 else values


def grpc(url: str, model: str, **request: Any) -> list[dict[str, Any]]:
    """All responses to one request."""
    stream = GrpcStream(url, model, **request)
    with contextlib.closing(stream):
        return list(stream)


def post(url: str, model: str, endpoint: str, body: Any) -> tuple[int, str]:
    with contextlib.closing(http.client.HTTPConnection(url, timeout=PATIENCE_S)) as connection:
        connection.request(
            "POST", f"/v2/models/{model}/{endpoint}", body if isinstance(body, bytes) else json.dumps(body)
        )
        response = connection.getresponse()
        return response.status, response.read().decode()


def generate(url: str, model: str, **body: Any) -> dict[str, Any]:
    status, text = post(url, model, "generate", body)
    assert status == 200, text
    return json.loads(text)


def generate_stream(url: str, model: str, **body: Any) -> list[dict[str, Any]]:
    status, text = post(url, model, "generate_stream", body)
    assert status == 200, text
    return [json.loads(event.removeprefix("data: ")) for event in text.split("\n\n") if event]


def metrics_page(url: str) -> str:
    until(lambda: _listens(url))  # the server opens this port a moment after it is ready
    with contextlib.closing(http.client.HTTPConnection(url, timeout=PATIENCE_S)) as connection:
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()


def _listens(url: str) -> bool:
    host, port = url.split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def metrics(url: str, model: str) -> dict[str, float]:
    """The project's own metrics of a model, by name and, where there are any, by labels other than the model's.

    Those of several engines are added up.
    """
    values: dict[str, float] = defaultdict(float)
    for name, labels, value in re.findall(r"^(\w+){(.*)} (\S+)$", metrics_page(url), re.MULTILINE):
        named = dict(re.findall(r'(\w+)="(.*?)"', labels))
        if named.pop("model", None) == model and not name.startswith("nv_inference"):
            del named["version"], named["engine"]
            others = ",".join(f'{label}="{text}"' for label, text in sorted(named.items()))
            values[f"{name}{{{others}}}" if others else name] += float(value)
    return dict(values)
