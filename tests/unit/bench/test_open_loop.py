"""The open loop on a clock of its own and an engine that is arithmetic; its figures against brute force."""

import random
from dataclasses import replace

import pytest

from nanoflow_backend.bench.online.arrivals import Load
from nanoflow_backend.bench.online.latency import Limits, Timed, open_loop_summary
from nanoflow_backend.bench.online.open_loop import News, measure_rates, run_open_loop
from nanoflow_backend.config.error import ConfigError

LOAD = Load(rates=(4.0,), warm_up_s=10.0, duration_s=100.0, lengths=(12, 5))


class FakeEngine:
    """Steps of 50 ms; each gives a token to every request that was there when it began. `slots` run at once."""

    STEP_S = 0.05

    def __init__(self, slots=10**9, refused=()):
        self.now_s, self.slots, self.refused = 0.0, slots, set(refused)
        self.left, self.sent, self.news, self.stopped = {}, {}, [], 0

    def clock(self):
        return self.now_s

    def send(self, request, prompt, output_tokens):
        self.sent[request] = (self.now_s, prompt)
        if request in self.refused:
            self.news.append(News(request, self.now_s, 0, True, "no room"))
        else:
            self.left[request] = output_tokens

    def receive(self, until_s):
        news, self.news = self.news, []
        if not self.left:
            self.now_s = max(self.now_s, until_s) if not news else self.now_s
            return news
        running = list(self.left)[: self.slots]
        self.now_s += self.STEP_S
        for request in running:
            self.left[request] -= 1
            news.append(News(request, self.now_s, 1, self.left[request] == 0))
            if not self.left[request]:
                del self.left[request]
        return news

    def stop(self):
        self.left.clear()
        self.stopped += 1


def run(load=LOAD, **engine):
    target = FakeEngine(**engine)
    (arrivals,) = load.arrivals(8192)
    requests, start_s = run_open_loop(target, arrivals, list(arrivals.prompts(100)), target.clock)
    return target, arrivals, requests, start_s


def test_no_arrival_waits_for_an_answer():
    """With one slot four requests are done in a second: at eight the queue only grows."""
    target, arrivals, requests, start_s = run(replace(LOAD, rates=(8.0,)), slots=1)
    assert len(requests) == len(arrivals.due_s)
    for number, request in enumerate(requests):
        assert request.due_s == start_s + arrivals.due_s[number]
        at_s, _ = target.sent[number]
        assert request.sent_s == at_s
        assert 0 <= at_s - request.due_s <= FakeEngine.STEP_S + 1e-9, "a step is all that can hold it up"
    assert [prompt for _, prompt in target.sent.values()] == list(arrivals.prompts(100))
    measured = [requests[number] for number in arrivals.measured]
    waits = [request.first_token_s for request in measured]
    assert waits[0] < 20.0 < 80.0 < waits[-1]
    assert target.stopped == 1


def test_a_run_ends_with_the_last_measured_request():
    target, arrivals, requests, _ = run()
    assert all(len(requests[number].token_s) == 5 for number in arrivals.measured)
    last_s = max(requests[number].token_s[-1] for number in arrivals.measured)
    assert target.now_s == last_s
    assert len(requests) < len(arrivals.due_s), "what is due later is not sent"


def brute_percentile(values, p):
    ordered, at = sorted(values), (len(values) - 1) * p / 100
    low = int(at)
    return ordered[low] + (at - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def random_requests(count, draw):
    requests, due_s = [], 0.0
    for number in range(count):
        due_s += draw.expovariate(3.0)
        at_s, token_s = due_s + draw.uniform(0.01, 0.6), []
        for _ in range(draw.randint(1, 9)):
            token_s.append(at_s)
            at_s += draw.choice([0.0, draw.uniform(0.01, 0.2)])
        failed = number % 11 == 3
        if failed:
            token_s.pop()
        requests.append(
            Timed(due_s, due_s + draw.uniform(0, 0.02), len(token_s) + failed, token_s, "lost" if failed else None)
        )
    return requests


@pytest.mark.parametrize("seed", range(3))
def test_the_summary_is_what_brute_force_says(seed):
    requests = random_requests(200, random.Random(seed))
    measured = range(20, 180)
    window_s = requests[20].due_s, requests[180].due_s
    limits = Limits(first_token_ms=300.0, between_tokens_ms=60.0)
    found = open_loop_summary(requests, measured, window_s, limits)
    first, between, normalized, kept, late = [], [], [], 0, []
    for number in measured:
        r = requests[number]
        late.append(1e3 * (r.sent_s - r.due_s))
        if r.failed:
            continue
        gaps = [1e3 * (b - a) for a, b in zip(r.token_s, r.token_s[1:], strict=False)]
        first.append(1e3 * (r.token_s[0] - r.due_s))
        between += gaps
        normalized.append(1e3 * (r.token_s[-1] - r.due_s) / len(r.token_s))
        kept += first[-1] <= 300.0 and (not gaps or sum(gaps) / len(gaps) <= 60.0)
    for name, values in (
        ("first_token_ms", first),
        ("between_tokens_ms", between),
        ("normalized_latency_ms", normalized),
    ):
        expected = {"mean": sum(values) / len(values), **{f"p{p}": brute_percentile(values, p) for p in (50, 90, 99)}}
        assert found[name] == pytest.approx(expected, abs=6e-4)
    seconds = window_s[1] - window_s[0]
    assert found["requests"] == 160
    assert found["failed"] == {"lost": 160 - len(first)}
    assert 0 < kept < len(first)
    assert found["goodput_per_s"] == pytest.approx(kept / seconds, abs=1e-4)
    assert found["goodput_share"] == pytest.approx(kept / 160, abs=1e-4)
    assert found["lateness_ms"]["max"] == pytest.approx(max(late), abs=6e-4)
    assert found["lateness_ms"]["p99"] == pytest.approx(brute_percentile(late, 99), abs=6e-4)
    tokens = [t for r in requests for t in r.token_s if window_s[0] <= t < window_s[1]]
    assert found["output_tokens_per_s"] == pytest.approx(len(tokens) / seconds, abs=6e-3)
    for end, at_s in zip(("begin", "end"), window_s, strict=True):
        there = [r for r in requests if r.failed is None and r.due_s < at_s <= r.token_s[-1]]
        assert found["in_flight"][end] == len(there)


def test_a_fake_engine_gives_the_latencies_that_arithmetic_says():
    """Without a queue the first token takes one step and what is left of the one before, the others a step each."""
    target = FakeEngine()
    found = measure_rates(target, LOAD, Limits(50.0), vocab_size=100, max_model_tokens=8192, clock=target.clock)
    (rate,) = found["rates"]
    assert found["workload"] == "12/5"
    assert found["slo"] == {"first_token_ms": 50.0}
    assert rate["rate"] == 4.0
    assert rate["between_tokens_ms"] == dict.fromkeys(("mean", "p50", "p90", "p99"), 50.0)
    assert 50.0 <= rate["first_token_ms"]["p50"] < rate["first_token_ms"]["p99"] < 100.0
    mean = rate["first_token_ms"]["mean"]
    assert rate["normalized_latency_ms"]["mean"] == pytest.approx((mean + 4 * 50.0) / 5, abs=1e-3)
    assert rate["lateness_ms"]["max"] < 50.0
    assert mean == pytest.approx(50.0 + rate["lateness_ms"]["p50"], abs=25.0), "what is late is late in the latency"
    assert 0 < rate["goodput_share"] < 1
    assert rate["goodput_per_s"] == pytest.approx(rate["goodput_share"] * rate["requests"] / 100.0, abs=1e-3)


def test_refused_requests_are_counted_and_have_kept_no_limit():
    (arrivals,) = LOAD.arrivals(8192)
    target = FakeEngine(refused=list(arrivals.measured)[::4])
    limits = Limits(first_token_ms=1e9)
    (rate,) = measure_rates(target, LOAD, limits, vocab_size=9, max_model_tokens=99, clock=target.clock)["rates"]
    refused = len(arrivals.measured[::4])
    assert rate["failed"] == {"no room": refused}
    assert rate["goodput_share"] == pytest.approx(1 - refused / rate["requests"], abs=1e-4)


def test_a_request_with_too_few_tokens_has_failed():
    class Short(FakeEngine):
        def send(self, request, prompt, output_tokens):
            super().send(request, prompt, output_tokens - 2 * (request == self.short))

    target = Short()
    (arrivals,) = LOAD.arrivals(8192)
    target.short = arrivals.measured[3]
    requests, _ = run_open_loop(target, arrivals, list(arrivals.prompts(9)), target.clock)
    failed = {number: request.failed for number, request in enumerate(requests) if request.failed}
    assert failed == {target.short: "3 tokens, expected 5"}


def test_figures_of_no_request_are_left_out():
    request = Timed(0.0, 0.0, 4, [], "refused")
    found = open_loop_summary([request], range(1), (0.0, 1.0), Limits())
    assert (found["first_token_ms"], found["between_tokens_ms"], found["normalized_latency_ms"]) == ({}, {}, {})
    assert "goodput_share" not in found


@pytest.mark.parametrize("limits", [{"first_token_ms": 0.0}, {"between_tokens_ms": -2.0}])
def test_limits_are_above_zero(limits):
    with pytest.raises(ConfigError, match="-limit: expected milliseconds above 0, got"):
        Limits(**limits)
