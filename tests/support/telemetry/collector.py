"""Collector: the place where a server's and its models' spans arrive."""

from __future__ import annotations

import http.server
import json
import threading
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Collector:
    """An OpenTelemetry collector, as far as two exporters need it: the server's speaks JSON, the SDK's protobuf.

    Attributes:
        spans: (service, trace id, span id, parent's id, name, begin ns, end ns, attributes), as they came.
    """

    def __init__(self) -> None:
        self.spans: list[tuple[Any, ...]] = []
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.take(body, self.headers["Content-Type"])
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1/traces"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def take(self, body: bytes, kind: str) -> None:
        if kind == "application/x-protobuf":
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                service = {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"]
                for span in (span for scope in resource.scope_spans for span in scope.spans):
                    ids = (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
                    values = {a.key: a.value.string_value or a.value.int_value for a in span.attributes}
                    times = (span.start_time_unix_nano, span.end_time_unix_nano)
                    self.spans.append((service, *ids, span.name, *times, values))
        else:
            for resource in json.loads(body)["resourceSpans"]:
                for span in (span for scope in resource["scopeSpans"] for span in scope["spans"]):
                    ids = (span["traceId"], span["spanId"], span.get("parentSpanId", ""))
                    times = (int(span["startTimeUnixNano"]), int(span["endTimeUnixNano"]))
                    self.spans.append(("the server", *ids, span["name"], *times, {}))
