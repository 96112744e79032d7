"""EngineProcess: what it answers, what it refuses, and what happens when a process dies."""

import os
import signal
import time

import pytest
from support.engine.engine_client import Client, config
from support.process_tree import alive, children
from support.waiting import until

from nanoflow_backend.engine import LLM, SamplingParams
from nanoflow_backend.process.engine_process import EngineError
from nanoflow_backend.request.request import Request
from nanoflow_backend.scheduler.batch import FinishReason
from nanoflow_backend.scheduler.waiting_queue import QueueFull

GREEDY = SamplingParams(max_tokens=32, temperature=0.0)


def test_the_engine_process_answers_as_the_engine_does(model, prompts):
    expected = LLM.from_pretrained(model).generate(prompts, GREEDY)
    client = Client(config(model, max_queue_size=len(prompts)))
    ready = client.process.start()
    assert (ready.page_tokens, ready.max_model_tokens) == (16, 512)
    for number, prompt in enumerate(prompts):
        client.process.submit(Request(number, prompt, GREEDY))
    client.process.submit(Request(100, [], GREEDY))
    client.process.submit(Request(101, [10**6], GREEDY))
    client.wait_for(lambda: len(client.finished) == len(prompts) and len(client.refused) == 2)
    assert [client.tokens[number] for number in range(len(prompts))] == [c.token_ids for c in expected]
    assert client.refused.keys() == {100, 101}
    client.wait_for(lambda: client.stats and client.stats.scheduler.used_pages == 0)  # the last ones come when all ends
    assert client.stats.observed.delivered_tokens == sum(map(len, client.tokens.values()))
    assert sum(client.stats.observed.ended.values()) == len(prompts)
    assert client.stats.scheduler.running_requests == client.stats.scheduler.waiting_requests == 0
    client.process.stop()
    client.process.stop()
    assert client.deaths == []
    assert not alive(client.process.pid)


def test_cancelled_requests_end_once_and_stopping_cancels_the_rest(model, prompts):
    client = Client(config(model))
    client.process.start()
    long = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
    for number, prompt in enumerate(prompts[:4]):
        client.process.submit(Request(number, prompt, long))
    client.wait_for(lambda: len(client.tokens) == 4)
    client.process.cancel(2)
    client.process.cancel(3, FinishReason.STOP)
    client.process.cancel(77)  # unknown: left alone
    client.wait_for(lambda: client.finished.keys() >= {2, 3})
    client.process.stop()
    assert client.finished[2] is FinishReason.CANCELLED
    assert client.finished.pop(3) is FinishReason.STOP
    assert set(client.finished.values()) <= {FinishReason.CANCELLED, FinishReason.LENGTH}
    assert len(client.finished) == 3


def test_it_says_how_far_it_is_and_who_begins(model, prompts):
    """What a stub goes by where the engine is in a long step, or stuck."""
    client = Client(config(model, max_running=1))
    client.process.start()
    client.wait_for(lambda: client.heartbeats)
    assert (client.heartbeats[0].steps, client.heartbeats[0].idle) == (0, True)
    long = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
    soon_s = time.monotonic() + 60
    client.process.submit(
        Request(0, prompts[0], long, queue_deadline=soon_s), Request(1, prompts[1], long, queue_deadline=soon_s)
    )
    client.process.submit(Request(2, prompts[2], long))
    client.wait_for(lambda: 0 in client.tokens)
    assert client.begun[0] == (0, []), "it was said before its first token"
    os.kill(client.process.pid, signal.SIGSTOP)
    before = len(client.heartbeats)
    time.sleep(1)
    assert len(client.heartbeats) <= before + 1
    os.kill(client.process.pid, signal.SIGCONT)
    until(lambda: any(beat.steps > 1 and not beat.idle for beat in client.heartbeats[before:]))
    for number in range(3):
        client.process.cancel(number)
    client.wait_for(lambda: len(client.finished) == 3)
    until(lambda: client.heartbeats[-1].idle)
    assert {request_id for request_id, _ in client.begun} <= {0, 1}
    client.process.stop()


def test_it_says_its_load_as_soon_as_requests_are_scheduled(model, prompts):
    client = Client(config(model, max_running=2))
    client.process.start()
    long = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
    client.process.submit(*(Request(number, prompts[number], long) for number in range(3)))
    client.wait_for(lambda: client.loads)
    load, tokens = client.loads[0]
    assert (load.running, load.waiting, load.received, tokens) == (2, 1, 3, 0), "it was said before the first token"
    assert load.used_pages == sum(-(-len(prompts[number]) // 16) for number in range(2)), "the pages of the prompts"
    for number in range(3):
        client.process.cancel(number)
    client.wait_for(lambda: len(client.finished) == 3)
    client.wait_for(lambda: client.stats and client.stats.scheduler.running_requests == 0)
    last = client.loads[-1][0]
    assert (last.running, last.waiting, last.used_pages) == (0, 0, 0)
    client.process.stop()


def test_a_full_queue_is_known_before_the_engine_says_so(model, prompts):
    client = Client(config(model, max_running=1, max_queue_size=2))
    client.process.start()
    long = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
    for number, prompt in enumerate(prompts[:3]):  # one runs, two wait
        client.process.check_room()
        client.process.submit(Request(number, prompt, long))
    with pytest.raises(QueueFull, match=r"[23] requests are waiting, as many as max_queue_size allows"):
        client.process.check_room()
    for number in range(3):
        client.process.cancel(number)
    client.wait_for(lambda: len(client.finished) == 3)
    client.process.submit(Request(3, prompts[3], GREEDY))
    client.wait_for(lambda: 3 in client.finished)
    assert not client.refused
    client.process.stop()


def test_requests_that_are_submitted_together_run_or_are_refused_together(model, prompts):
    client = Client(config(model, max_running=1, max_queue_size=3))
    client.process.start()
    long = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
    client.process.submit(Request(0, prompts[0], long), Request(1, prompts[1], long))
    client.wait_for(lambda: 0 in client.tokens)  # it runs, and one waits
    with pytest.raises(QueueFull, match="1 requests are waiting, and max_queue_size leaves room for 2 more, too few"):
        client.process.check_room(3)
    client.process.submit(*(Request(number, prompts[number], GREEDY) for number in (2, 3, 4)))
    client.process.submit(Request(5, prompts[5], GREEDY), Request(6, [7] * 9999, GREEDY))
    client.wait_for(lambda: client.refused.keys() == {2, 3, 4, 5, 6})
    assert client.refused[5] == client.refused[6]
    client.process.submit(*(Request(number, prompts[number], GREEDY) for number in (7, 8)))
    for number in (0, 1):
        client.process.cancel(number)
    client.wait_for(lambda: client.finished.keys() == {0, 1, 7, 8})
    client.process.stop()


def test_refused_requests_take_no_room(model, prompts):
    client = Client(config(model, max_running=1, max_queue_size=1))
    client.process.start()
    for number in range(9):
        client.process.check_room()
        client.process.submit(Request(number, [7] * 9999, GREEDY))
        client.wait_for(lambda number=number: len(client.refused) > number)
    client.process.submit(Request(9, prompts[0], GREEDY))
    client.wait_for(lambda: 9 in client.finished)
    client.process.stop()


def test_a_failed_start_says_what_failed(model, tmp_path):
    with pytest.raises(EngineError, match=r"config\.json: No such file"):
        Client(config(tmp_path)).process.start()
    with pytest.raises(EngineError, match="expected sequential"):
        Client(config(model, schedule="fastest")).process.start()
    with pytest.raises(EngineError, match="python: /nowhere/python: No such file"):
        Client(config(model, python="/nowhere/python")).process.start()


def test_a_killed_engine_is_reported_and_refuses_what_follows(model, prompts):
    client = Client(config(model))
    client.process.start()
    os.kill(client.process.pid, signal.SIGKILL)
    client.wait_for(lambda: client.deaths)
    assert "SIGKILL" in client.deaths[0]
    with pytest.raises(EngineError, match="SIGKILL"):
        client.process.submit(Request(0, prompts[0], GREEDY))
    client.process.stop()


def test_news_that_cannot_be_taken_is_a_death_and_no_silence(model, prompts, monkeypatch):
    monkeypatch.setattr(Client, "on_news", lambda self, news: 1 // 0)
    client = Client(config(model))
    client.process.start()
    client.process.submit(Request(0, prompts[0], GREEDY))
    client.wait_for(lambda: client.deaths)
    assert "ZeroDivisionError" in client.deaths[0]
    client.process.stop()


def test_a_rank_that_is_stopped_ends_with_its_engine(model, prompts):
    """The collective waits for it, and it cannot notice that its engine is gone."""
    client = Client(config(model, tensor_parallel=2, engine_stall_s=2))
    client.process.start()
    (rank_pid,) = children(client.process.pid)
    os.kill(rank_pid, signal.SIGSTOP)
    client.process.submit(Request(0, prompts[0], GREEDY))
    client.wait_for(lambda: client.deaths)
    assert client.deaths == [f"process {client.process.pid} was killed: it made no step for 2 s (engine_stall_s)"]
    until(lambda: not alive(rank_pid) and not alive(client.process.pid))
    client.process.stop()


@pytest.mark.parametrize("victim", ["rank", "engine"])
def test_a_tensor_parallel_group_ends_together(model, victim):
    """Kill the rank: the engine reports it. Kill the engine: the rank goes too."""
    client = Client(config(model, tensor_parallel=2))
    client.process.start()
    engine_pid = client.process.pid
    (rank_pid,) = children(engine_pid)
    os.kill({"rank": rank_pid, "engine": engine_pid}[victim], signal.SIGKILL)
    client.wait_for(lambda: client.deaths)
    assert ("rank 1" if victim == "rank" else "SIGKILL") in client.deaths[0]
    until(lambda: not alive(rank_pid) and not alive(engine_pid))
    client.process.stop()
