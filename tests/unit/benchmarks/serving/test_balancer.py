"""The balancer of the rolling update: whom it asks, what it sends elsewhere, and what it calls lost."""

import http.server
import json
import threading
from collections import Counter
from http import HTTPStatus
from types import SimpleNamespace

import pytest
from support.waiting import until

from benchmarks.serving.balancer import Balancer, Lost


class Server:
    """Answers requests, readiness and its metrics page; keeps connections until it is stopped."""

    def __init__(self, load=0):
        self.load, self.ready, self.status, self.breaks = load, True, 200, False
        self.connections, self.asked = set(), 0
        fake = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                if self.path == "/metrics":
                    running = f'vllm:num_requests_running{{model="m"}} {fake.load}'
                    self.answer(200, f'{running}\nvllm:num_requests_waiting{{model="m"}} 0\n')
                else:
                    self.answer(200 if fake.ready else 400, "")

            def do_POST(self):
                fake.connections.add(self.client_address)
                fake.asked += 1
                self.rfile.read(int(self.headers["Content-Length"]))
                if fake.breaks:
                    self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{")
                    self.close_connection = True
                else:
                    self.answer(fake.status, json.dumps({"error": "no room"} if fake.status != 200 else {"n": 1}))

            def answer(self, status, text):
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def finish(self):
                super().finish()
                fake.connections.discard(self.client_address)

            def log_message(self, *arguments):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def servers():
    made = {"a": Server(load=3), "b": Server(load=0)}
    yield made
    for server in made.values():
        server.stop()


@pytest.fixture
def balancer(servers):
    with Balancer(list(servers), "m") as made:
        for name, server in servers.items():
            made.serve(name, SimpleNamespace(http_url=server.url, metrics_url=server.url))
        made.wait_until_ready()
        yield made


def test_requests_go_to_the_one_with_the_least_to_do(balancer, servers):
    until(lambda: balancer.endpoints[0].load == 3)
    answered = Counter(balancer.ask({})[0] for _ in range(2))
    assert answered == {"b": 2}
    servers["b"].load = 9
    until(lambda: balancer.endpoints[1].load == 9)
    assert balancer.ask({})[0] == "a"


def test_what_a_server_refuses_goes_elsewhere_and_is_counted(balancer, servers):
    until(lambda: balancer.endpoints[0].load == 3)
    servers["b"].status = HTTPStatus.SERVICE_UNAVAILABLE
    assert balancer.ask({}) == ("a", {"n": 1})
    assert balancer.retried == {'{"error": "no room"}': 1}


def test_a_new_connection_that_nobody_takes_has_lost_nothing(balancer, servers):
    until(lambda: balancer.endpoints[0].load == 3)
    servers["b"].stop()
    assert balancer.ask({}) == ("a", {"n": 1})
    until(lambda: not balancer.endpoints[1].ready)


def test_an_answer_that_breaks_off_is_lost(balancer, servers):
    until(lambda: balancer.endpoints[0].load == 3)
    servers["b"].breaks = True
    with pytest.raises(Lost, match="b: IncompleteRead"):
        balancer.ask({})
    servers["b"].breaks, servers["b"].status = False, HTTPStatus.INTERNAL_SERVER_ERROR
    with pytest.raises(Lost, match="b: 500"):
        balancer.ask({})


def test_connections_to_a_server_that_is_not_ready_are_closed(balancer, servers):
    until(lambda: balancer.endpoints[0].load == 3)
    assert balancer.ask({})[0] == balancer.ask({})[0] == "b"
    assert len(servers["b"].connections) == 1, "it was kept"
    servers["b"].ready = False
    until(lambda: not servers["b"].connections)
    assert balancer.ask({})[0] == "a"
