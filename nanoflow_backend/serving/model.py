"""TritonPythonModel is the model that the server's Python backend loads, in its stub only and without torch.

A request's way in, on the server's thread: tensors -> Call -> engine process. Chats and long prompts become Calls on
other threads.
Its way out: news of the engine process (reader thread) -> Senders (a few threads) -> Reply -> client.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import os
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from nanoflow_backend.config import version_folder
from nanoflow_backend.process import logs
from nanoflow_backend.process.callbacks import Callbacks
from nanoflow_backend.process.engine_process import EngineError
from nanoflow_backend.process.messages import Heartbeat, News, Ready, Refusal, Stats
from nanoflow_backend.process.supervisor import Supervisor
from nanoflow_backend.process.ticker import Ticker
from nanoflow_backend.request.request import Request
from nanoflow_backend.request.sampling_params import InvalidRequest
from nanoflow_backend.scheduler.batch import FinishReason
from nanoflow_backend.scheduler.waiting_queue import QueueFull
from nanoflow_backend.serving import shared_memory
from nanoflow_backend.serving.call import Call, first_timeout, own_parameters
from nanoflow_backend.serving.failure import Code, Failure, overdue, without_words
from nanoflow_backend.serving.inputs import is_cancellation
from nanoflow_backend.serving.limits import Limits, has_short_json, reads_quickly
from nanoflow_backend.serving.placement import engine_parameters, place
from nanoflow_backend.serving.prompt_fan_in import PromptFanIn
from nanoflow_backend.serving.prompt_threads import PromptThreads, SlowRequest
from nanoflow_backend.serving.reply import Reply
from nanoflow_backend.serving.response_channel import ServerChannel, check_numpy
from nanoflow_backend.serving.senders import Senders
from nanoflow_backend.serving.server_log import ServerLog
from nanoflow_backend.serving.tensors import Arrays, complete_config, read_inputs
from nanoflow_backend.telemetry import dialects
from nanoflow_backend.telemetry.metrics import Metrics
from nanoflow_backend.telemetry.tracing import Tracer
from nanoflow_backend.telemetry.writers import Writers
from nanoflow_backend.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

# A client that is gone is noticed within this, and what asking for all live requests takes (some 90 us each).
CANCELLATION_PERIOD_S = 0.1
JOIN_TIMEOUT_S = 5.0
# What is overdue is the engine's to end, at its next step; where it has not for GRACE_S, it is ended here.
DEADLINE_PERIOD_S, GRACE_S = 0.1, 0.25
CODES: dict[str, Code] = {"invalid": "INVALID_ARG", "queue_full": "UNAVAILABLE", "internal": "INTERNAL"}  # of refusals


class TritonPythonModel:
    """One engine behind the server. The names and signatures of the public methods are the Python backend's."""

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        complete_config(config)
        return config

    def initialize(self, args: Mapping[str, str]) -> None:
        """Return when every rank of the engine is ready. Whatever it raises ends in the server's log as it is."""
        check_numpy()
        logs.name_origin(args["model_name"], args["model_instance_name"])
        logs.configure(ServerLog())
        shared_memory.make_private()
        model_config = json.loads(args["model_config"])
        if "model_transaction_policy" not in model_config:
            raise ValueError("config.pbtxt: expected model_transaction_policy { decoupled: true }")
        self._streams = bool(model_config["model_transaction_policy"]["decoupled"])
        folder = Path(args["model_repository"], args["model_version"])
        config = version_folder.load(folder, engine_parameters(model_config))
        families = dialects.families(dialects.chosen(config, model_config, folder))
        self._tokenizer = Tokenizer.find(config.model)
        if self._tokenizer is None:
            log.warning("no tokenizer.json in %s: prompts come as input_ids, and answers have no text", config.model)
        self._ids = itertools.count()
        config = place(config, args, model_config)
        endpoint = config.otlp_traces_endpoint
        self._tracer = Tracer(endpoint, args["model_name"]) if endpoint else None
        self._engine = Supervisor(
            config,
            Callbacks(
                on_news=self._on_news,
                on_stats=self._on_stats,
                on_heartbeat=self._on_heartbeat,
                on_refusal=self._on_refusal,
                on_death=self._on_death,
                on_restart=self._on_restart,
            ),
            host_pid=os.getppid(),
        )
        self._ready = self._engine.start()
        self._limits = Limits.of(config, self._ready, self._tokenizer)
        self._metrics = Metrics(self._ready)
        self._senders = Senders()
        self._long_prompts = PromptThreads()
        self._tickers = [
            Ticker("cancellation", CANCELLATION_PERIOD_S, self._cancel_abandoned),
            Ticker("deadlines", DEADLINE_PERIOD_S, self._end_overdue),
        ]
        self._writers: Writers | None = None
        with contextlib.suppress(pb_utils.TritonModelException):  # the server's metrics are switched off
            name, version, engine = (args[f"model_{what}"] for what in ("name", "version", "instance_name"))
            labels = {"model": name, "version": version, "model_name": name, "engine": engine}
            self._writers = Writers(pb_utils.MetricFamily, labels, self._metrics, families)
        log.info("%s", self._ready.description)

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            channel = ServerChannel(request.get_response_sender(), request.request_id())
            try:
                self._submit(request, channel)
            except Exception as error:
                self._refuse(channel, error)

    def is_ready(self) -> bool:
        """Servers since 26.04 ask this for the readiness of the model; older ones do not, and say that it is ready."""
        return self._engine.is_ready

    def finalize(self) -> None:
        """The server calls this when no request is in flight, or none will be waited for any longer."""
        for ticker in self._tickers:
            ticker.stop(JOIN_TIMEOUT_S)
        if self._writers is not None:
            self._writers.stop(JOIN_TIMEOUT_S)
        unloaded = Failure("UNAVAILABLE", "the model is being unloaded")
        self._long_prompts.close(unloaded, JOIN_TIMEOUT_S)
        self._engine.stop()
        self._senders.close(unloaded)
        self._senders.stop(JOIN_TIMEOUT_S)
        if self._tracer is not None:
            self._tracer.close()

    def _submit(self, request: Any, channel: ServerChannel) -> None:
        """Whatever it raises, nothing was sent then, and nothing will be."""
        arrived_s = time.monotonic()
        tensors = read_inputs(request)
        if is_cancellation(tensors):
            channel.send({"num_cancelled": np.array([self._cancel_named(channel.request_id)], np.uint32)}, True, {})
            return
        self._engine.check_room()  # before any work for it: under overload most requests end here
        own, timeout_us = request.parameters() or "{}", request.timeout()
        self._limits.check(tensors, own)
        quick = reads_quickly(tensors, own)
        if not quick:  # read later, when the server's memory may be another request's
            tensors = {name: array.copy() for name, array in tensors.items()}
        parse = functools.partial(self._parse, tensors, own, timeout_us, request.requested_output_names())
        context = request.trace().get_context() if self._tracer else None
        start = functools.partial(self._submit_prompts, channel, arrived_s, context)
        if quick:
            start(parse())
            return
        said = (tensors, own) if has_short_json(tensors, own) else ({}, "{}")  # else it is known once it is read
        limit = first_timeout(said[0], own_parameters(said[1], timeout_us), self._limits.max_queue_us)
        due = limit and (arrived_s + limit[0] / 1e6, overdue(limit[1], limit[0]))
        self._long_prompts.add(SlowRequest(channel, parse, start, functools.partial(self._refuse, channel), due))

    def _parse(self, tensors: Arrays, own: str, timeout_us: int, outputs: Collection[str]) -> list[Call]:
        """Understand a request. `own`: its parameters, as JSON."""
        calls = Call.parse(tensors, own_parameters(own, timeout_us), outputs, self._tokenizer, self._limits)
        if calls[0].stream and not self._streams:
            raise InvalidRequest("stream: expected false, for config.pbtxt says decoupled: false")
        return calls

    def _refuse(self, channel: ServerChannel, error: Exception) -> None:
        failure = _failure(error)
        self._metrics.refused(failure.reason)
        channel.fail(failure)

    def _submit_prompts(self, channel: ServerChannel, arrived_s: float, context: str | None, calls: list[Call]) -> None:
        """All or none of them. Whatever it raises, nothing was sent then. `context`: of the server's trace."""
        self._engine.check_room(sum(call.params.n for call in calls))
        is_batch = calls[0].batch_index is not None
        channels = PromptFanIn(channel, calls[0].stream).channels(len(calls)) if is_batch else [channel]
        requests = [self._request(call, arrived_s) for call in calls]
        replies = []
        try:
            for request, call, own_channel in zip(requests, calls, channels, strict=True):
                trace = self._tracer.request(context, arrived_s) if self._tracer else None
                cancel = functools.partial(self._cancel, request.id)
                replies.append(Reply(call, own_channel, self._tokenizer, cancel, trace))
                self._senders.add(request, replies[-1])
        except Failure as closed:
            self._metrics.refused(closed.reason)
            channels[0].fail(closed)  # it is one failure, whoever tells of it first
            return
        for call in calls:
            self._metrics.queued(call.params.n)
        try:
            self._engine.submit(*requests)
            for reply in replies:
                reply.submitted()
        except Exception as error:
            # The replies are on their senders' hands, and news of the engine's death may have come first.
            for request in requests:
                self._senders.fail(request.id, _failure(error))

    def _request(self, call: Call, arrived_s: float) -> Request:
        timeouts_us = call.timeout_us, call.queue_timeout_us
        deadline, queue_deadline = (arrived_s + us / 1e6 if us else None for us in timeouts_us)
        return Request(next(self._ids), call.prompt, call.params, call.priority, deadline, queue_deadline, arrived_s)

    def _cancel_named(self, client_id: str) -> int:
        """End what runs or waits under a client's id; how many prompts that are. An id may have been used twice."""
        if not client_id:
            raise InvalidRequest("cancel: expected the id of the requests to end as this request's own, got none")
        chats = self._long_prompts.cancel(client_id)  # those that are not in the engine yet
        replies = [reply for reply in self._senders.live() if reply.channel.request_id == client_id]
        for reply in replies:
            reply.cancel()
        return len(chats) + len(replies)

    def _cancel(self, request_id: int, reason: FinishReason, index: int | None) -> None:
        with contextlib.suppress(EngineError):  # a dead engine runs nothing
            self._engine.cancel(request_id, reason, index)

    def _cancel_abandoned(self) -> None:
        for reply in self._senders.live():
            if not reply.cancelled and reply.channel.is_cancelled():
                reply.cancel()

    def _end_overdue(self) -> None:
        now_s = time.monotonic()
        self._long_prompts.refuse_overdue(now_s)
        for _, request_id, reason in self._senders.fail_overdue(now_s - GRACE_S):
            self._cancel(request_id, reason, None)

    def _on_news(self, news: News) -> None:
        self._senders.begin(news.begun)
        self._senders.file(news.deltas)
        if self._metrics.carry(news.load) and self._writers:
            self._writers.load_changed()

    def _on_stats(self, stats: Stats) -> None:
        self._metrics.take(stats)
        if self._writers:
            self._writers.statistics_came()

    def _on_heartbeat(self, heartbeat: Heartbeat) -> None:
        if heartbeat.idle:
            self._metrics.confirm()

    def _on_refusal(self, refusal: Refusal) -> None:
        self._metrics.refused(refusal.reason)
        self._senders.fail(refusal.request_id, Failure(CODES[refusal.reason], refusal.message))

    def _on_death(self, how: str) -> None:
        self._metrics.engine_died()
        for reason, requests in self._senders.fail_all(Failure("UNAVAILABLE", how, "engine_failure")).items():
            self._metrics.refused(reason, requests)
        log.error("%s", how)

    def _on_restart(self, ready: Ready) -> None:
        self._metrics.engine_restarted(ready)
        self._limits = self._limits.with_cache(ready)


def _failure(error: Exception) -> Failure:
    match error:
        case Failure():
            return error
        case InvalidRequest():
            return Failure("INVALID_ARG", str(error))
        case QueueFull():
            return Failure("UNAVAILABLE", str(error), "queue_full")
        case EngineError():
            return Failure("UNAVAILABLE", str(error))
    log.error("a request broke: %s", without_words(error))
    pb_utils.Logger.log_verbose(f"a request broke: {error}")  # where the server's --log-verbose asks for it
    return Failure("INTERNAL", f"{type(error).__name__}: {error}")
