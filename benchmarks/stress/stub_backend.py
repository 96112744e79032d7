"""This stands in for the module that the Python backend gives its models, and for the server behind it."""

from __future__ import annotations

import importlib
import sys
import threading
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from nanoflow_backend.process import logs
from nanoflow_backend.serving.tensors import OUTPUTS

FINAL = 1


class ResponseSender:
    """The server's end: checks that nothing is asked of it after the final response."""

    def __init__(self):
        self.responses, self.final, self.cancelled, self.slow_s = [], threading.Event(), False, 0.0

    def send(self, response=None, flags=0):
        assert not self.final.is_set(), "sent after the final response"
        self.responses.append(response)
        if flags == FINAL:
            self.final.set()

    def is_cancelled(self):
        assert not self.final.is_set(), "asked after the final response"
        time.sleep(self.slow_s)
        assert not self.final.is_set(), "asked after the final response"
        return self.cancelled


class ServerRequest:
    def __init__(self, parameters="", timeout_us=0, request_id="", **tensors):
        self.request_id = lambda: request_id
        inputs = [types.SimpleNamespace(name=lambda n=n: n, as_numpy=lambda v=v: v) for n, v in tensors.items()]
        self.inputs = lambda: inputs
        self.parameters, self.timeout = lambda: parameters, lambda: timeout_us
        self.requested_output_names = lambda: [tensor.name for tensor in OUTPUTS]
        self.sender = ResponseSender()
        self.get_response_sender = lambda: self.sender

    def result(self):
        assert self.sender.final.wait(30), "no final response"
        return self.sender.responses[-1]


def stub_module():
    """triton_python_backend_utils as far as the model uses it."""
    stub = types.ModuleType("triton_python_backend_utils")

    class TritonError:
        INVALID_ARG, UNAVAILABLE, CANCELLED, INTERNAL = "INVALID_ARG", "UNAVAILABLE", "CANCELLED", "INTERNAL"

        def __init__(self, message, code):
            message.encode()  # as the server must
            self.message, self.code = message, code

    class MetricFamily:
        GAUGE, COUNTER = "gauge", "counter"

        def __init__(self, name, description, kind):
            raise stub.TritonModelException("metrics not supported")

    stub.TritonError, stub.MetricFamily = TritonError, MetricFamily
    stub.TritonModelException = type("TritonModelException", (Exception,), {})
    stub.InferenceResponse = lambda output_tensors, error=None: types.SimpleNamespace(
        outputs={tensor.name: tensor.value for tensor in output_tensors}, error=error
    )
    stub.Tensor = lambda name, value: types.SimpleNamespace(name=name, value=value)
    stub.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL
    stub.Logger = types.SimpleNamespace(
        log_info=lambda text: None,
        log_warn=lambda text: None,
        log_error=lambda text: None,
        log_verbose=lambda text: None,
    )
    return stub


@contextmanager
def model_module() -> Iterator[types.ModuleType]:
    """nanoflow_backend.serving.model, imported beside a stand-in of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(logs.ORIGIN, "")  # put back what a model sets
        patch.setitem(sys.modules, "triton_python_backend_utils", stub_module())
        for name in ("response_channel", "server_log", "model"):  # those that import it
            patch.delitem(sys.modules, f"nanoflow_backend.serving.{name}", raising=False)
        yield importlib.import_module("nanoflow_backend.serving.model")
        for name in ("response_channel", "server_log", "model"):
            del sys.modules[f"nanoflow_backend.serving.{name}"]
