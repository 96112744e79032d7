"""A client soaks a server: rounds of load at twice the capacity with all that goes wrong in production, then silence.

In a round, requests come at random times over gRPC (plain ones, deadlines, malformed ones, some of a client that does
not read for a while, where asked for cancels and clients that leave) and HTTP (some leave in the middle of a stream);
the engine is killed or stopped, or the model reloaded. Then every request must have ended, once, and the server must
hold no more than before.

The 2.51 server sometimes keeps the connection of a client that left, and waits for it when the model is to unload
(examples/README.md). So no reload comes after clients that cancel or leave, and such connections are counted apart.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import random
import select
import threading
import time
from collections.abc import Callable
from typing import Any

from tritonclient.grpc.service_pb2 import ModelInferRequest

from benchmarks.serving import server_state
from benchmarks.serving.grpc_streams import GrpcStreams
from benchmarks.stress.faults import PATIENCE_S, Faults, wait_for
from benchmarks.stress.ledger import ALLOWED, ANSWERED, CANCELLED, DISCONNECTED, Entry, Ledger
from nanoflow_backend.embedded.server import EmbeddedServer

MODEL = "nanoflow"
CONNECTIONS = 4
SLOW = CONNECTIONS  # the number of one more, whose client reads and does not read in turns
SLOW_READS_S = 0.5, 2.0  # at least and at most, each time
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "and", "does", "not", "mind", "a", "page")
MIX = {"plain": 6, "deadline": 1, "cancel": 2, "malformed": 1, "slow": 1}
assert MIX.keys() == ALLOWED.keys()
MALFORMED: tuple[dict[str, Any], ...] = (
    {"max_tokens": 0},
    {"temperature": -1},
    {"top_p": 2},
    {"no_such_field": 1},
    {"max_tokens": "many"},
    {"stop": [""]},
)


class SoakClient:
    """One client of one server; `ledger` says what became of its requests."""

    def __init__(self, server: EmbeddedServer, seed: int = 0) -> None:
        self.ledger = Ledger()
        self.not_ready: list[str] = []
        self.departures = 0  # clients that left a connection of gRPC, whatever was under way
        self.probes = 0  # requests that are not in the ledger: they only ask whether there is an answer
        self._server = server
        self._random = random.Random(seed)
        self.faults = Faults(server, MODEL, self.ledger, self._answers)
        self._connections = [self._connect(number) for number in range(CONNECTIONS + 1)]
        self._calls: list[dict[int, Entry]] = [{} for _ in self._connections]
        self._slow_reads, self._slow_until_s = True, math.inf
        self._cancels: list[tuple[float, int, int, Entry]] = []  # when, connection, stream
        self._expected = self._canary()

    def close(self) -> None:
        for connection in self._connections:
            connection.disconnect()
        self.faults.close()

    def capacity(self, running: int, seconds: float) -> float:
        """Requests a second that the server answers when `running` plain ones are always there."""
        before = self.ledger.count(ANSWERED)
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            while len(self.ledger.open) < running:
                self._send("plain")
            self._receive(0.05)
        answered = self.ledger.count(ANSWERED) - before
        self.drain()
        return answered / seconds

    def round(self, duration_s: float, requests_per_s: float, event: Callable[[], None] | None, cancels: bool) -> None:
        """Load for `duration_s`, with `event` on a thread of its own in the middle; then until all is quiet."""
        stop = threading.Event()
        threads = [threading.Thread(target=self._http_clients, args=(stop,))]
        threads += [threading.Thread(target=self._watch_readiness, args=(stop,))]
        if event is not None:
            threads.append(threading.Timer(duration_s / 2, self._guarded(event)))
        for thread in threads:
            thread.start()
        start_s = next_s = time.monotonic()
        leave_s = start_s + self._random.uniform(1, 5) if cancels else math.inf
        mix = {kind: share for kind, share in MIX.items() if cancels or kind != "cancel"}
        self._slow_until_s = start_s
        while (now_s := time.monotonic()) < start_s + duration_s:
            while next_s <= now_s:
                self._send(*self._random.choices(list(mix), mix.values()))
                next_s += self._random.expovariate(requests_per_s)
            if leave_s <= now_s:
                self._leave(self._random.randrange(len(self._connections)))
                leave_s = now_s + self._random.uniform(1, 5)
            self._receive(min(0.02, max(0.0, next_s - now_s)))
        stop.set()
        while any(thread.is_alive() for thread in threads):  # the event may take long
            self._receive(0.02)
        self.drain()

    def drain(self) -> None:
        """Until every request has ended, and the engine says so too."""
        self._slow_reads, self._slow_until_s = True, math.inf
        deadline_s = time.monotonic() + PATIENCE_S
        while self.ledger.open and time.monotonic() < deadline_s:
            self._receive(0.05)
        for entry in list(self.ledger.open):
            self.ledger.end(entry, "nothing: no final response came")
        wait_for("an idle engine, and the end of one that was replaced", self._is_quiet)

    def _send(self, kind: str) -> None:
        number = SLOW if kind == "slow" else self._random.randrange(CONNECTIONS)
        connection = self._connections[number]
        stream = connection.open()
        timeout_us = int(10 ** self._random.uniform(3, 6)) if kind == "deadline" else 0
        entry = self._calls[number][stream] = self.ledger.enter(kind, timeout_us / 1e6 or math.inf)
        connection.send(stream, self._request(kind, timeout_us))
        if kind == "cancel":
            self._cancels.append((entry.sent_s + self._random.expovariate(5), number, stream, entry))

    def _request(self, kind: str, timeout_us: int) -> ModelInferRequest:
        sampling: dict[str, Any] = {"max_tokens": self._random.randint(1, 64), "ignore_eos": True}
        if kind == "malformed":
            sampling |= self._random.choice(MALFORMED)
        message = ModelInferRequest(model_name=MODEL)
        message.parameters["triton_enable_empty_final_response"].bool_param = True
        if timeout_us:
            message.parameters["timeout"].int64_param = timeout_us
        text = " ".join(self._random.choices(WORDS, k=self._random.randint(1, 60)))
        for name, datatype, content in (
            ("text_input", "BYTES", text.encode()),
            ("sampling_parameters", "BYTES", json.dumps(sampling).encode()),
            ("stream", "BOOL", b"\1" if kind == "slow" else self._random.choice([b"\1", b"\1", b"\0"])),
            ("return_num_output_tokens", "BOOL", b"\1"),
            ("return_total_output_tokens", "BOOL", b"\1"),
        ):
            message.inputs.add(name=name, datatype=datatype, shape=[1])
            length = len(content).to_bytes(4, "little") if datatype == "BYTES" else b""
            message.raw_input_contents.append(length + content)
        return message

    def _receive(self, wait_s: float) -> None:
        """Book what comes within `wait_s`, and the client's own cancels that are due."""
        heard = self._connections if self._hears_slow() else self._connections[:SLOW]
        for connection in select.select(heard, [], [], wait_s)[0]:
            number = self._connections.index(connection)
            try:
                answers = connection.read()
            except (ConnectionError, OSError) as error:
                self.ledger.faults.append(f"{error}")
                self._leave(number)
                continue
            for stream, answer in answers:
                if (entry := self._calls[number].get(stream)) is not None:
                    book(self.ledger, entry, answer)
                    if entry not in self.ledger.open:
                        del self._calls[number][stream]
                        connection.close(stream)
        now_s = time.monotonic()
        due, self._cancels = [c for c in self._cancels if c[0] <= now_s], [c for c in self._cancels if c[0] > now_s]
        for _, number, stream, entry in due:
            if self._calls[number].get(stream) is entry:
                del self._calls[number][stream]
                self._connections[number].cancel(stream)
                self.ledger.end(entry, CANCELLED)

    def _hears_slow(self) -> bool:
        """Whether the slow client reads now."""
        if (now_s := time.monotonic()) >= self._slow_until_s:
            self._slow_reads, self._slow_until_s = not self._slow_reads, now_s + self._random.uniform(*SLOW_READS_S)
        return self._slow_reads

    def _connect(self, number: int) -> GrpcStreams:
        return GrpcStreams(self._server.grpc_url, back_pressure=number == SLOW)

    def _leave(self, number: int) -> None:
        """One of the clients goes, and does not want what it had asked for; another comes."""
        for stream, entry in self._calls[number].items():
            with contextlib.suppress(OSError):
                self._connections[number].cancel(stream)
            self.ledger.end(entry, DISCONNECTED)
        self._connections[number].disconnect()
        self.departures += 1
        self._calls[number] = {}
        with contextlib.suppress(ConnectionError):
            self._connections[number] = self._connect(number)

    def _http_clients(self, stop: threading.Event) -> None:
        """One request after the other; every third leaves in the middle of a stream."""
        while not stop.is_set():
            for endpoint, leaves in (("generate", False), ("generate_stream", False), ("generate_stream", True)):
                entry = self.ledger.enter("plain")
                try:
                    self._http_request(entry, endpoint, leaves)
                except (OSError, http.client.HTTPException, ValueError) as error:
                    self.ledger.end(entry, f"error {error!r}")
            stop.wait(0.1)

    def _http_request(self, entry: Entry, endpoint: str, leaves: bool) -> None:
        body = {"text_input": "the quick", "max_tokens": 32, "ignore_eos": True, "stream": endpoint != "generate"}
        body |= {"return_num_output_tokens": True, "return_total_output_tokens": True}
        with contextlib.closing(http.client.HTTPConnection(self._server.http_url, timeout=PATIENCE_S)) as connection:
            connection.request("POST", f"/v2/models/{MODEL}/{endpoint}", json.dumps(body))
            response = connection.getresponse()
            for line in response:
                if not (content := line.removeprefix(b"data: ").strip()):
                    continue
                event = json.loads(content)
                if "error" in event:
                    self.ledger.refuse(entry, event["error"])
                    return
                if leaves:
                    self.ledger.end(entry, DISCONNECTED)
                    return
                self.ledger.answer(entry, event["num_output_tokens"], event.get("total_output_tokens"))
        if entry in self.ledger.open:
            self.ledger.end(entry, "an end without a total")

    def _watch_readiness(self, stop: threading.Event) -> None:
        while not stop.wait(0.2):
            for path in ("/v2/health/live", "/v2/health/ready", f"/v2/models/{MODEL}/ready"):
                try:
                    status = self._get(path)
                except OSError as error:
                    status = f"{error!r}"
                if status != 200:
                    self.not_ready.append(f"{path}: {status}")

    def _guarded(self, event: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                event()
            except Exception as error:
                self.ledger.faults.append(f"{event.__name__}: {error!r}")

        return run

    def _is_quiet(self) -> bool:
        self._receive(0.05)
        now = server_state.metrics(self._server, MODEL)
        busy = ("nanoflow_num_requests_running", "nanoflow_num_requests_waiting", "nanoflow_kv_cache_usage_perc")
        processes = {role: len(pids) for role, pids in server_state.by_role(self._server).items()}
        return not any(now[name] for name in busy) and set(processes.values()) == {1}

    def _answers(self) -> bool:
        return self._canary() == self._expected

    def _canary(self) -> bytes:
        self.probes += 1
        body = {"text_input": "the quick", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        with contextlib.closing(http.client.HTTPConnection(self._server.http_url, timeout=PATIENCE_S)) as connection:
            connection.request("POST", f"/v2/models/{MODEL}/generate", json.dumps(body))
            return connection.getresponse().read()

    def _get(self, path: str) -> int:
        with contextlib.closing(http.client.HTTPConnection(self._server.http_url, timeout=5)) as connection:
            connection.request("GET", path)
            return connection.getresponse().status


def book(ledger: Ledger, entry: Entry, answer: Any) -> None:
    if answer.error_message:
        ledger.refuse(entry, answer.error_message)
        return
    names = [output.name for output in answer.infer_response.outputs]
    contents = dict(zip(names, answer.infer_response.raw_output_contents, strict=True))
    total = contents.get("total_output_tokens")
    new = int.from_bytes(contents["num_output_tokens"], "little") if "num_output_tokens" in contents else 0
    if contents:
        ledger.answer(entry, new, None if total is None else int.from_bytes(total, "little"))
