"""The open loop through the real server: every token arrives, refusals are named, and the stream is left in order."""

import json
import time

import pytest
from support.commands.command_line import assert_one_line, run_here
from support.places import DEMO_MODEL

from benchmarks.server import add_model
from nanoflow_backend.bench.online.server_target import ServerTarget


@pytest.fixture(scope="module")
def url(server, tmp_path_factory):
    repository = tmp_path_factory.mktemp("repository")
    add_model(repository, DEMO_MODEL, kv_cache_tokens=8192)
    add_model(repository, DEMO_MODEL, name="narrow", kv_cache_tokens=8192, max_queue_size=1, max_running=1)
    return server(repository).grpc_url


def news_of(target, requests, patience_s=60.0):
    """All news until so many requests have ended."""
    found, until_s = [], time.perf_counter() + patience_s
    while sum(news.ended for news in found) < requests:
        assert time.perf_counter() < until_s
        found += target.receive(until_s)
    return found


def test_the_command_measures_a_served_model(url, tmp_path):
    sizes = ("--input-tokens", "12", "--output-tokens", "5", "--duration", "0.6", "--warm-up", "0.3")
    rates = ("--rate", "20", "--rate", "40", "--ttft-limit", "60000")
    output = tmp_path / "r.json"
    done = run_here("bench", "online", "--model", DEMO_MODEL, "--url", url, *sizes, *rates, "--output", output)
    assert done.returncode == 0, done.stderr
    measured = json.loads(output.read_text())
    assert (measured["engine"], measured["workload"]) == ("nanoflow behind tritonserver", "12/5")
    for rate in measured["rates"]:
        assert rate["failed"] == {}
        assert rate["goodput_share"] == 1.0
        assert 0 < rate["first_token_ms"]["p50"] < 60000


def test_tokens_come_in_order_and_once(url):
    target = ServerTarget(url, "nanoflow")
    for request in range(6):
        target.send(request, [5 + request] * 8, 3 + request)
    found = news_of(target, 6)
    for request in range(6):
        own = [news for news in found if news.request == request]
        assert sum(news.tokens for news in own) == 3 + request
        assert [news.ended for news in own] == [False] * (len(own) - 1) + [True]
        assert own == sorted(own, key=lambda news: news.time_s)
    target.stop()


def test_a_refused_request_is_told_by_name_and_the_others_go_on(url):
    target = ServerTarget(url, "narrow")
    for request in range(5):
        target.send(request, [7] * 8, 20)
    found = news_of(target, 5)
    refused = [news for news in found if news.failed]
    assert 1 <= len(refused) <= 4
    assert len({news.request for news in refused}) == len(refused)
    assert all("queue" in news.failed for news in refused), refused
    whole = set(range(5)) - {news.request for news in refused}
    assert all(sum(news.tokens for news in found if news.request == request) == 20 for request in whole)
    target.stop()


def test_what_still_runs_is_ended_and_the_next_run_begins_anew(url):
    target = ServerTarget(url, "nanoflow")
    for request in range(3):
        target.send(request, [9] * 8, 1500)
    target.receive(time.perf_counter() + 30)
    begin_s = time.perf_counter()
    target.stop()
    assert time.perf_counter() - begin_s < 20, "nobody waits for 1,500 tokens"
    assert target.receive(time.perf_counter() + 0.1) == [], "the ends of these are no news of the next run"
    target.send(0, [9] * 8, 4)
    assert sum(news.tokens for news in news_of(target, 1)) == 4
    target.stop()


def test_a_model_that_is_not_there_is_named(url):
    done = run_here("bench", "online", "--model", DEMO_MODEL, "--url", url, "--rate", "1", "--served-model", "another")
    assert_one_line(done, f"--url {url}: ")
