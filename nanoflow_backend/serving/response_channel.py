"""ServerChannel sends responses through the server's response sender. It is imported in its stub only."""

from __future__ import annotations

import functools
import threading
from typing import Any

import triton_python_backend_utils as pb_utils

from nanoflow_backend.serving.failure import Failure
from nanoflow_backend.serving.tensors import Arrays, Parameters


class ServerChannel:
    """A `reply.Channel` over one response sender.

    The final response frees what `is_cancelled` looks at: asked later, or meanwhile, the server (2.51) crashes.
    """

    def __init__(self, sender: Any, request_id: str) -> None:
        self.request_id = request_id
        self._sender = sender
        self._ending = threading.Lock()
        self._ended = False

    def send(self, tensors: Arrays, final: bool, parameters: Parameters) -> None:
        extra = {"parameters": dict(parameters)} if parameters and has_response_parameters() else {}
        outputs = [pb_utils.Tensor(name, value) for name, value in tensors.items()]
        response = pb_utils.InferenceResponse(outputs, **extra)
        if final:
            self._end(response)
        else:
            self._sender.send(response)

    def fail(self, failure: Failure) -> None:
        error = pb_utils.TritonError(failure.message, getattr(pb_utils.TritonError, failure.code))
        self._end(pb_utils.InferenceResponse(output_tensors=[], error=error))

    def is_cancelled(self) -> bool:
        with self._ending:
            return not self._ended and bool(self._sender.is_cancelled())

    def _end(self, response: Any) -> None:
        with self._ending:
            self._ended = True
            self._sender.send(response, pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


@functools.cache
def has_response_parameters() -> bool:
    """Servers since 25.02 have them."""
    try:
        pb_utils.InferenceResponse([], parameters={})
    except TypeError:
        return False
    return True
