"""Balancer spreads requests over servers as a gateway does: by what their metrics pages say, and by what it sent.

It is a reference for measurements, not for production: a thread of its own reads each server's page every 50 ms, and a
request goes to the one with the least to do, that is what the page says runs and waits, and what was sent since.
A request that a server refuses before it has begun goes to another one: a server that stops closes new connections, and
answers on those that are open until they are closed, for which it waits. So they are, as soon as it is not ready.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nanoflow_backend.embedded.server import EmbeddedServer

PERIOD_S = 0.05
FRESH_S = 0.05  # a page has what was sent so long before it was asked for
PATIENCE_S = 60.0  # then a request is lost
LOAD = re.compile(r"^vllm:num_requests_(?:running|waiting){.*} (\S+)$", re.M)


class Lost(RuntimeError):
    """A request without its answer: no server took it, or one broke off."""


@dataclass
class Endpoint:
    """A server as its balancer sees it."""

    name: str
    http_url: str = ""
    metrics_url: str = ""
    ready: bool = False
    load: float = 0.0  # requests, by the last page
    sent_s: list[float] = field(default_factory=list)  # moments of requests that this page may not have yet
    answered: int = 0
    idle: list[http.client.HTTPConnection] = field(default_factory=list)


class Balancer:
    """Ask from any thread.

    Attributes:
        retried: requests that went to another server, by the reason.
    """

    def __init__(self, names: Sequence[str], model: str) -> None:
        self.endpoints = [Endpoint(name) for name in names]
        self.retried: Counter[str] = Counter()
        self._model = model
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._watchers = [threading.Thread(target=self._watch, args=(endpoint,)) for endpoint in self.endpoints]

    def __enter__(self) -> Balancer:
        for watcher in self._watchers:
            watcher.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopping.set()
        for watcher in self._watchers:
            watcher.join()

    def serve(self, name: str, server: EmbeddedServer) -> None:
        """An endpoint is this server from now on."""
        (endpoint,) = (endpoint for endpoint in self.endpoints if endpoint.name == name)
        endpoint.http_url, endpoint.metrics_url = server.http_url, server.metrics_url

    def wait_until_ready(self) -> None:
        """Until all endpoints are."""
        while not all(endpoint.ready for endpoint in self.endpoints):
            time.sleep(PERIOD_S)

    def ask(self, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """(the server that answered, its answer). Raises: Lost."""
        refused: set[str] = set()
        until_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < until_s:
            endpoint = self._pick(refused)
            if endpoint is None:  # all have refused, or none is ready: wait for one
                refused.clear()
                time.sleep(PERIOD_S)
                continue
            status, text = self._post(endpoint, json.dumps(body))
            if status == http.HTTPStatus.OK:
                endpoint.answered += 1
                return endpoint.name, json.loads(text)
            with self._lock:
                self.retried[text] += 1
            refused.add(endpoint.name)
        raise Lost(f"no server took it for {PATIENCE_S:g} s")

    def _pick(self, refused: set[str]) -> Endpoint | None:
        with self._lock:
            able = [endpoint for endpoint in self.endpoints if endpoint.ready and endpoint.name not in refused]
            if not able:
                return None
            least = min(able, key=lambda endpoint: (endpoint.load + len(endpoint.sent_s), endpoint.answered))
            least.sent_s.append(time.monotonic())
            return least

    def _post(self, endpoint: Endpoint, body: str) -> tuple[int, str]:
        """(status, answer); or (503, why it was refused before it began). Raises: Lost."""
        with self._lock:
            connection = endpoint.idle.pop() if endpoint.idle else None
        fresh = connection is None
        connection = connection or http.client.HTTPConnection(endpoint.http_url, timeout=PATIENCE_S)
        try:
            connection.request("POST", f"/v2/models/{self._model}/generate", body)
            response = connection.getresponse()
            status, text = response.status, response.read().decode()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            if fresh and isinstance(error, ConnectionError):  # before the first byte of an answer
                return http.HTTPStatus.SERVICE_UNAVAILABLE, "the server took no new connection"
            raise Lost(f"{endpoint.name}: {error!r}") from error
        with self._lock:
            keep = endpoint.ready
            if keep:
                endpoint.idle.append(connection)
        if not keep:
            connection.close()
        if status not in (http.HTTPStatus.OK, http.HTTPStatus.SERVICE_UNAVAILABLE):
            raise Lost(f"{endpoint.name}: {status} {text}")
        return status, text

    def _watch(self, endpoint: Endpoint) -> None:
        """Whether it is ready, and its load."""
        while not self._stopping.wait(PERIOD_S):
            ready, load, asked_s = False, endpoint.load, time.monotonic()
            if endpoint.http_url:
                with contextlib.suppress(OSError, http.client.HTTPException):
                    ready = get(endpoint.http_url, f"/v2/models/{self._model}/ready")[0] == http.HTTPStatus.OK
                    load = sum(map(float, LOAD.findall(get(endpoint.metrics_url, "/metrics")[1])))
            with self._lock:
                endpoint.ready, endpoint.load = ready, load
                endpoint.sent_s = [sent_s for sent_s in endpoint.sent_s if sent_s > asked_s - FRESH_S]
                unused = [] if ready else endpoint.idle
                endpoint.idle = [] if unused else endpoint.idle
            for connection in unused:
                connection.close()


def get(url: str, path: str) -> tuple[int, str]:
    """Raises: OSError, HTTPException."""
    with contextlib.closing(http.client.HTTPConnection(url, timeout=5.0)) as connection:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
