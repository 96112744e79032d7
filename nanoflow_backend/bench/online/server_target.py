"""ServerTarget is a served model, anywhere: all requests go over one gRPC stream, as token ids."""

from __future__ import annotations

import queue
import threading
import time
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nanoflow_backend.bench.online.open_loop import News, what_came
from nanoflow_backend.config.error import ConfigError

if TYPE_CHECKING:
    from tritonclient.grpc.service_pb2 import ModelInferRequest

CONNECT_TIMEOUT_S = 10.0
PATIENCE_S = 600.0  # without any news, while requests are running


class ServerTarget:
    """A Target. A thread reads what comes and notes when; tokens of one response have one time.

    tritonclient's own stream tells of an error, but not whose: here the protocol's messages are read as they are.

    Raises:
        ConfigError: there is no tritonclient, or no ready model of this name at `url` (host:port).
    """

    def __init__(self, url: str, model: str) -> None:
        try:
            import grpc
            from tritonclient.grpc import InferenceServerClient, service_pb2_grpc
        except ImportError:
            raise ConfigError("tritonclient is not installed: pip install 'nanoflow-triton[server]'") from None
        self._model, self._url, self._run = model, url, ""
        try:
            with InferenceServerClient(url) as client:
                if not client.is_model_ready(model, client_timeout=CONNECT_TIMEOUT_S):
                    raise ConfigError(f"--url {url}: the server has no ready model {model!r}")
        except Exception as error:
            raise error if isinstance(error, ConfigError) else ConfigError(f"--url {url}: {error}") from None
        unlimited = [(f"grpc.max_{way}_message_length", -1) for way in ("send", "receive")]
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(url, options=unlimited))
        self._running: set[int] = set()
        self._requests: queue.SimpleQueue[ModelInferRequest | None] = queue.SimpleQueue()  # None: no more
        self._came: queue.SimpleQueue[tuple[float, Any]] = queue.SimpleQueue()  # answers with their times, or the end
        self._reader: threading.Thread | None = None

    def send(self, request: int, prompt: list[int], output_tokens: int) -> None:
        if self._reader is None:
            self._open()
        self._running.add(request)
        ids = np.array(prompt, np.int32)
        made = self._message(request, [("input_ids", "INT32", len(ids), ids.tobytes()), ("stream", "BOOL", 1, b"\1")])
        made.outputs.add(name="output_ids")
        made.parameters["max_tokens"].int64_param = output_tokens
        made.parameters["ignore_eos"].bool_param = True
        made.parameters["temperature"].string_param = "0"
        self._requests.put(made)

    def receive(self, until_s: float) -> list[News]:
        """Raises: ConfigError, the server ended the stream, or has had no news for PATIENCE_S."""
        wait_s = until_s - time.perf_counter()
        found = what_came(self._came, min(wait_s, PATIENCE_S))
        if not found and self._running and wait_s > PATIENCE_S:
            raise ConfigError(f"--url {self._url}: no news of {len(self._running)} requests for {PATIENCE_S:g} s")
        return [news for time_s, answer in found if (news := self._news(time_s, answer))]

    def stop(self) -> None:
        """Tell the server to end what is left, and read the stream to its end: so a client should leave.

        Raises: ConfigError, the stream does not end.
        """
        if self._reader is None:
            return
        for request in self._running:
            self._requests.put(self._message(request, [("cancel", "BOOL", 1, b"\1")]))
        self._requests.put(None)
        self._reader.join(PATIENCE_S)
        if self._reader.is_alive():
            raise ConfigError(f"--url {self._url}: the stream does not end, {PATIENCE_S:g} s after its last request")
        self._reader = None
        self._running.clear()
        self._came = queue.SimpleQueue()  # what is in the old one is no news of the next run

    def _open(self) -> None:
        self._requests = queue.SimpleQueue()
        self._run = uuid.uuid4().hex  # ids are the server's, not ours alone
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            for answer in self._stub.ModelStreamInfer(iter(self._requests.get, None)):
                self._came.put((time.perf_counter(), answer))
        except Exception as error:  # of gRPC, whose own exceptions have no type here
            self._came.put((time.perf_counter(), error))

    def _message(self, request: int, inputs: Sequence[tuple[str, str, int, bytes]]) -> ModelInferRequest:
        from tritonclient.grpc.service_pb2 import ModelInferRequest

        made = ModelInferRequest(model_name=self._model, id=f"{self._run}-{request}")
        made.parameters["triton_enable_empty_final_response"].bool_param = True
        for name, datatype, elements, content in inputs:
            made.inputs.add(name=name, datatype=datatype, shape=[elements])
            made.raw_input_contents.append(content)
        return made

    def _news(self, time_s: float, answer: Any) -> News | None:
        """Raises: ConfigError, the answer is the end of the stream."""
        if isinstance(answer, Exception):
            raise ConfigError(f"--url {self._url}: the stream ended: {answer}")
        response = answer.infer_response
        run, _, number = response.id.rpartition("-")
        if run != self._run or not number.isdecimal():
            raise ConfigError(
                f"--url {self._url}: an answer of an unknown request {response.id!r}: {answer.error_message}"
            )
        request = int(number)
        tokens = response.outputs[0].shape[0] if response.outputs else 0
        failed = answer.error_message or None
        ended = bool(failed) or response.parameters["triton_final_response"].bool_param
        if ended:
            if request not in self._running:
                return None  # the empty end that follows an error
            self._running.discard(request)
        return News(request, time_s, tokens, ended, failed)
