"""ServerChannel sends responses through the server's response sender. It is imported in its stub only."""

from __future__ import annotations

import functools
import sys
import threading
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from nanoflow_backend.serving.failure import Failure
from nanoflow_backend.serving.tensors import Arrays, Parameters


class ServerChannel:
    """A `reply.Channel` over one response sender.

    A sender is the server's until the final response: one lock keeps `is_cancelled` from asking it then or later.
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


def check_numpy() -> None:
    """Servers before 24.11 cannot read string tensors under numpy 2.

    They do not say which they are. Parameters of a response came with 25.02: what has them is new enough.
    """
    if int(np.__version__.split(".")[0]) >= 2 and not has_response_parameters():
        raise RuntimeError(
            f"numpy {np.__version__} does not work with this server, which is older than 25.02: "
            f"install 'numpy<2' for {sys.executable}"
        )
