"""Tracer makes the spans of a request, joins them to the server's own trace, and sends them to an OTLP collector.

Nothing here runs in the engine: the spans of a request are made when it has ended, from its account, on the thread that
sent its last response; a thread of the SDK exports them.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.scheduler.account import Account

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.export import SpanExporter

EXPORT_TIMEOUT_S = 5.0  # of one attempt; unloading the model may have to wait for the last


class RequestTrace:
    """One request that the server traces. Tell it the end once."""

    def __init__(self, tracer: Tracer, parent: Context, arrived_s: float) -> None:
        self._tracer, self._parent, self._arrived_s = tracer, parent, arrived_s

    def end(self, outcome: str, prompt_tokens: int, output_tokens: int, account: Account | None) -> None:
        """`outcome`: the finish reason, or the code of the failure. No account: the engine did not have it."""
        attributes: dict[str, str | int | float] = {
            "gen_ai.usage.input_tokens": prompt_tokens,
            "gen_ai.usage.output_tokens": output_tokens,
            "gen_ai.response.finish_reason": outcome,
        }
        phases = {}
        if account is not None:
            attributes["nanoflow.peak_kv_pages"] = account.peak_pages
            if account.energy_j is not None:
                attributes["nanoflow.energy_j"] = account.energy_j
            begins_s = {"queue": account.arrived_s, "prefill": account.admitted_s, "decode": account.first_token_s}
            began = [(name, begin_s) for name, begin_s in begins_s.items() if begin_s is not None]
            ends_s = [begin_s for _, begin_s in began[1:]] + [account.ended_s]
            phases = {name: (begin_s, end_s) for (name, begin_s), end_s in zip(began, ends_s, strict=True)}
        self._tracer.write(self._parent, (self._arrived_s, time.monotonic()), attributes, phases)


class Tracer:
    """Spans of one model.

    Args:
        endpoint: of OTLP over HTTP, with its path: http://collector:4318/v1/traces
        exporter: instead of one to the endpoint.

    Raises:
        ConfigError: the packages are not there.
    """

    def __init__(self, endpoint: str, model: str, exporter: SpanExporter | None = None) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace import set_span_in_context
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise ConfigError(
                f"otlp_traces_endpoint: needs the tracing extra, pip install 'nanoflow-triton[tracing]': {error}"
            ) from None
        self._set_span = set_span_in_context
        self._propagator = TraceContextTextMapPropagator()
        self._provider = TracerProvider(resource=Resource.create({"service.name": "nanoflow", "nanoflow.model": model}))
        exporter = exporter or OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("nanoflow")
        self._epoch_s = time.time() - time.monotonic()

    def request(self, context: str | None, arrived_s: float) -> RequestTrace | None:
        """`context`: of the server's own span, as JSON with a W3C traceparent. None: this request is not traced."""
        if not context:
            return None
        return RequestTrace(self, self._propagator.extract(json.loads(context)), arrived_s)

    def write(
        self,
        parent: Context,
        whole: tuple[float, float],
        attributes: dict[str, str | int | float],
        phases: dict[str, tuple[float, float]],
    ) -> None:
        """A span with one for each phase in it; (begin, end) in seconds of `time.monotonic()`."""
        span = self._tracer.start_span("llm_request", parent, attributes=attributes, start_time=self._ns(whole[0]))
        inside = self._set_span(span, parent)
        for name, (begin_s, end_s) in phases.items():
            self._tracer.start_span(name, inside, start_time=self._ns(begin_s)).end(self._ns(end_s))
        span.end(self._ns(whole[1]))

    def close(self) -> None:
        """Export what is left."""
        self._provider.shutdown()

    def _ns(self, moment_s: float) -> int:
        """Of the epoch."""
        return int((self._epoch_s + moment_s) * 1e9)
