"""TritonPythonModel: the model that the server's Python backend loads. Imported in its stub only, and torch-free.

A request's way in, on the server's thread: tensors -> Call -> engine process.
Its way out: news of the engine process (reader thread) -> Senders (a few threads) -> Reply -> client.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from nanoflow_backend.config import EngineConfig
from nanoflow_backend.engine.messages import News, Refusal
from nanoflow_backend.engine.process import EngineError
from nanoflow_backend.engine.supervisor import Supervisor
from nanoflow_backend.engine.tokenizer import Tokenizer
from nanoflow_backend.scheduler.request import Request
from nanoflow_backend.scheduler.sampling_params import InvalidRequest
from nanoflow_backend.scheduler.waiting_queue import QueueFull
from nanoflow_backend.serving.call import Call
from nanoflow_backend.serving.failure import Failure
from nanoflow_backend.serving.gauges import FLUSH_PERIOD_S, Gauges
from nanoflow_backend.serving.reply import Reply
from nanoflow_backend.serving.senders import Senders
from nanoflow_backend.serving.tensors import INPUTS, Arrays, complete
from nanoflow_backend.serving.ticker import Ticker

# A client that is gone is noticed within this, and what asking for all live requests takes (some 90 us each).
CANCELLATION_PERIOD_S = 0.1
JOIN_TIMEOUT_S = 5.0


class TritonPythonModel:
    """One engine behind the server. The names and signatures of the public methods are the Python backend's."""

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        complete(config)
        return config

    def initialize(self, args: Mapping[str, str]) -> None:
        """Return when every rank of the engine is ready. Whatever it raises ends in the server's log as it is."""
        _check_numpy()
        model_config = json.loads(args["model_config"])
        if not model_config.get("model_transaction_policy", {}).get("decoupled"):
            raise ValueError("config.pbtxt: expected model_transaction_policy { decoupled: true }")
        config = EngineConfig.load(
            Path(args["model_repository"], args["model_version"], "engine.json"), _engine_parameters(model_config)
        )
        has_tokenizer = Path(config.model, "tokenizer.json").is_file()
        self._tokenizer = Tokenizer.from_pretrained(config.model) if has_tokenizer else None
        self._ids = itertools.count()
        self._gauges: Gauges | None = None
        self._max_queue_us = config.queue_timeout_us or 0
        self._engine = Supervisor(config, self._on_news, self._on_refusal, self._on_death, host_pid=os.getppid())
        self._ready = self._engine.start()
        self._senders = Senders()
        self._tickers = [Ticker("cancellation", CANCELLATION_PERIOD_S, self._cancel_abandoned)]
        with contextlib.suppress(pb_utils.TritonModelException):  # the server's metrics are switched off
            labels = {"model": args["model_name"], "version": args["model_version"]}
            self._gauges = Gauges(partial(_Gauge, labels=labels), self._ready)
            self._tickers.append(Ticker("gauges", FLUSH_PERIOD_S, self._gauges.flush))
        pb_utils.Logger.log_info(f"{args['model_name']}: {self._ready.description}")

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            channel = _Channel(request.get_response_sender())
            try:
                self._submit(request, channel)
            except Exception as error:
                channel.fail(_failure(error))

    def is_ready(self) -> bool:
        """Servers since 26.03 ask this for the readiness of the model; older ones do not, and say that it is ready."""
        return self._engine.is_ready

    def finalize(self) -> None:
        """The server calls this when no request is in flight, or none will be waited for any longer."""
        for ticker in self._tickers:
            ticker.stop(JOIN_TIMEOUT_S)
        self._engine.stop()
        self._senders.close(Failure("UNAVAILABLE", "the model is being unloaded"))
        self._senders.stop(JOIN_TIMEOUT_S)

    def _submit(self, request: Any, channel: _Channel) -> None:
        """Whatever it raises, nothing was sent then, and nothing will be."""
        came_s = time.monotonic()
        self._engine.check_room()  # before any work for it: under overload most requests end here
        tensors = {}
        for tensor in INPUTS:
            if (value := pb_utils.get_input_tensor_by_name(request, tensor.name)) is not None:
                tensors[tensor.name] = value.as_numpy()
        parameters = json.loads(request.parameters() or "{}")
        if request.timeout():
            parameters["timeout"] = request.timeout()
        call = Call.parse(
            tensors,
            parameters,
            request.requested_output_names(),
            self._tokenizer,
            self._ready.vocab_size,
            self._max_queue_us,
        )
        request_id = next(self._ids)
        self._senders.add(request_id, Reply(call, channel, self._tokenizer, self._canceller(request_id)))
        try:
            deadlines = [came_s + us / 1e6 if us else None for us in (call.timeout_us, call.queue_timeout_us)]
            self._engine.submit(Request(request_id, call.prompt, call.params, call.priority, *deadlines))
        except Exception as error:
            # Not raised: the reply is on its sender's hands, and news of the engine's death may have come first.
            self._senders.fail(request_id, _failure(error))

    def _canceller(self, request_id: int) -> Callable[[], None]:
        def cancel() -> None:
            with contextlib.suppress(EngineError):  # a dead engine runs nothing
                self._engine.cancel(request_id)

        return cancel

    def _cancel_abandoned(self) -> None:
        for reply in self._senders.live():
            if reply.channel.is_cancelled():
                reply.cancel()

    def _on_news(self, news: News) -> None:
        self._senders.file(news.deltas)
        if self._gauges is not None:
            self._gauges.take(news.stats)

    def _on_refusal(self, refusal: Refusal) -> None:
        failure = Failure("UNAVAILABLE" if refusal.overloaded else "INVALID_ARG", refusal.message)
        self._senders.fail(refusal.request_id, failure)

    def _on_death(self, how: str) -> None:
        self._senders.fail_all(Failure("UNAVAILABLE", how))
        pb_utils.Logger.log_error(how)


class _Channel:
    """A response sender of the server in the words of `reply.Channel`.

    The final response frees what `is_cancelled` looks at: asked later, or meanwhile, the server (2.51) crashes.
    """

    def __init__(self, sender: Any) -> None:
        self._sender = sender
        self._ending = threading.Lock()
        self._ended = False

    def send(self, tensors: Arrays, final: bool) -> None:
        response = pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in tensors.items()])
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


def _failure(error: Exception) -> Failure:
    match error:
        case Failure():
            return error
        case InvalidRequest():
            return Failure("INVALID_ARG", str(error))
        case EngineError() | QueueFull():
            return Failure("UNAVAILABLE", str(error))
    pb_utils.Logger.log_error(f"a request broke: {type(error).__name__}: {error}")
    return Failure("INTERNAL", f"{type(error).__name__}: {error}")


def _engine_parameters(model_config: Mapping[str, Any]) -> dict[str, str]:
    """The `parameters` of config.pbtxt; those in capitals (EXECUTION_ENV_PATH, ...) are the Python backend's."""
    entries = model_config.get("parameters", {}).items()
    return {name: entry["string_value"] for name, entry in entries if not name.isupper()}


class _Gauge:
    """A metric of the server; it lives as long as its family does."""

    def __init__(self, name: str, description: str, labels: Mapping[str, str]) -> None:
        self._family = pb_utils.MetricFamily(name=name, description=description, kind=pb_utils.MetricFamily.GAUGE)
        self._metric = self._family.Metric(labels=labels)

    def set(self, value: float) -> None:
        self._metric.set(value)


def _check_numpy() -> None:
    """Servers before 24.11 read string tensors wrongly under numpy 2, and their stub dies of it.

    They do not say which they are. Parameters of a response came with 25.02: what has them is new enough.
    """
    if int(np.__version__.split(".")[0]) < 2:
        return
    try:
        pb_utils.InferenceResponse([], parameters={})
    except TypeError:
        raise RuntimeError(
            f"numpy {np.__version__} does not work with this server, which is older than 25.02: "
            f"install 'numpy<2' for {sys.executable}"
        ) from None
