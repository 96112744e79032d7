"""Engine and EngineProcess: the loop, its overshoot, its text, and what happens when a process dies."""

import os
import random
import signal
import threading
from pathlib import Path

import checkpoints
import pytest
import tiny_tokenizers
from waiting import until

from nanoflow_backend.config import ConfigError, EngineConfig
from nanoflow_backend.engine import LLM, Engine, SamplingParams, ranks
from nanoflow_backend.process.callbacks import Callbacks
from nanoflow_backend.process.child import Child
from nanoflow_backend.process.engine_process import EngineError, EngineProcess
from nanoflow_backend.process.messages import Stats
from nanoflow_backend.request.request import Request
from nanoflow_backend.request.sampling_params import InvalidRequest
from nanoflow_backend.scheduler.batch import FinishReason
from nanoflow_backend.scheduler.waiting_queue import QueueFull
from nanoflow_backend.text.tokenizer import Tokenizer

GREEDY = SamplingParams(max_tokens=32, temperature=0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tiny_tokenizers.llama3(tmp_path_factory.mktemp("model"))
    vocab_size = Tokenizer.from_pretrained(folder).vocab_size
    return checkpoints.save(checkpoints.make("llama", vocab_size=vocab_size), folder)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(256) for _ in range(rng.randint(1, 60))] for _ in range(24)]


def test_async_scheduling_changes_no_token(model, prompts):
    params = [
        SamplingParams(max_tokens=20 + number, temperature=number % 3 / 2, seed=number, top_k=number % 5 * 10)
        for number in range(len(prompts))
    ]
    options = {"dense_batch_tokens": 48, "chunk_tokens": 16, "page_tokens": 8}
    arms = [
        LLM.from_pretrained(model, async_scheduling=on, **options).generate(prompts, params) for on in (True, False)
    ]
    assert [c.token_ids for c in arms[0]] == [c.token_ids for c in arms[1]]


def test_scarce_pages_change_no_token(model, prompts):
    """Preempted requests compute again and draw the same tokens."""
    params = [SamplingParams(max_tokens=48, temperature=1.0, seed=number) for number in range(len(prompts))]
    ample = LLM.from_pretrained(model).generate(prompts, params)
    scarce = LLM.from_pretrained(model, kv_cache_tokens=192, page_tokens=4, dense_batch_tokens=32)
    scarce.generate(prompts * 2, SamplingParams(max_tokens=2))  # it learns to expect short outputs, and admits too many
    assert [c.token_ids for c in scarce.generate(prompts, params)] == [c.token_ids for c in ample]
    assert scarce.engine.scheduler.stats.preemptions > 0
    scarce.engine.scheduler.check()
    assert scarce.engine.scheduler.stats.used_pages == 0


def test_tokens_without_a_seed_repeat_with_the_engine_seed(model, prompts):
    hot = SamplingParams(max_tokens=16, temperature=1.0)
    runs = [[c.token_ids for c in LLM.from_pretrained(model, seed=s).generate(prompts, hot)] for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_stop_token_ids_stop_and_overshoot_is_one_token_at_most(model, prompts):
    llm = LLM.from_pretrained(model)
    plain = llm.generate(prompts, GREEDY)
    stops = [completion.token_ids[11] for completion in plain]
    before = llm.engine.scheduler.stats.overshoot_tokens
    params = [SamplingParams(max_tokens=32, temperature=0.0, stop_token_ids=(stop,)) for stop in stops]
    for stopped, whole, stop in zip(llm.generate(prompts, params), plain, stops, strict=True):
        assert stopped.token_ids == whole.token_ids[: whole.token_ids.index(stop) + 1]
        assert (stopped.finish_reason, stopped.stop_reason) == (FinishReason.STOP, stop)
    assert 0 < llm.engine.scheduler.stats.overshoot_tokens - before <= len(prompts)


def test_stop_strings_end_the_text_and_free_the_pages(model):
    llm = LLM.from_pretrained(model)
    prompt = "The quick brown fox"
    (whole,) = llm.generate([prompt], GREEDY)
    stop = whole.text[8:11]
    params = SamplingParams(max_tokens=32, temperature=0.0, stop=(stop,))
    (stopped,) = llm.generate([prompt], params)
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert (stopped.finish_reason, stopped.stop_reason) == (FinishReason.STOP, stop)
    assert llm.engine.scheduler.stats.used_pages == 0


def test_a_bad_prompt_is_named_and_leaves_the_engine_usable(model, prompts):
    llm = LLM.from_pretrained(model)
    with pytest.raises(InvalidRequest, match=r"prompt 1: prompt: expected token ids in 0\.\."):
        llm.generate([prompts[0], [10**6], prompts[1]], GREEDY)
    assert not llm.engine.has_work
    assert llm.generate(prompts[:1], GREEDY)[0].finish_reason is FinishReason.LENGTH


def test_a_stream_that_is_given_up_leaves_the_engine_usable(model, prompts):
    llm = LLM.from_pretrained(model)
    expected = [completion.token_ids for completion in llm.generate(prompts[:2], GREEDY)]
    stream = llm.stream([(prompt, GREEDY) for prompt in prompts])
    next(stream)
    with pytest.raises(RuntimeError, match="runs other requests"):
        llm.generate(prompts[:2], GREEDY)
    stream.close()
    assert not llm.engine.has_work
    with pytest.raises(ZeroDivisionError):
        list(llm.stream((prompts[1 // left], GREEDY) for left in (2, 2, 0)))
    assert [completion.token_ids for completion in llm.generate(prompts[:2], GREEDY)] == expected
    assert llm.engine.scheduler.stats.used_pages == 0


def test_an_interrupted_step_is_an_error_and_no_endless_loop(model, prompts, monkeypatch):
    engine = Engine.from_pretrained(model)
    monkeypatch.setattr(engine.executor, "launch_forward", lambda batch: 1 // 0)
    engine.add(Request(0, prompts[0], GREEDY))
    with pytest.raises(ZeroDivisionError):
        engine.step()
    engine.cancel_all()
    assert [delta.finish_reason for delta in engine.step()] == [FinishReason.CANCELLED]
    with pytest.raises(RuntimeError, match="there is work, and nothing can run"):
        engine.step()


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ("The fox", GREEDY, "prompts: expected a list of texts"),
        ([1, 2], GREEDY, "prompts: expected a list of texts"),
        (["a", "b"], [GREEDY], "params: expected one, or one for each of 2 prompts; got 1"),
        (["a"], [], "params: expected one, or one for each of 1 prompts; got 0"),
    ],
)
def test_prompts_and_params_that_do_not_match_are_refused(model, prompts, params, message):
    llm = LLM.from_pretrained(model)
    with pytest.raises(InvalidRequest, match=message):
        llm.generate(prompts, params)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_model_tokens": 10**6}, "max_model_tokens: expected at most 512"),
        ({"schedule": "fastest"}, "schedule fastest: expected sequential, nano-batched-N"),
        ({"schedule": "nano-batched-600"}, "schedule nano-batched-600: parts: expected 1..512"),
        ({"page_size": 16}, "unknown field `page_size`"),
        (
            {"kv_cache_tokens": 10**12},
            r"kv_cache_tokens: 10+ tokens take \d.* of memory are free on cpu: expected at most",
        ),
    ],
)
def test_a_bad_configuration_is_refused_by_name(model, fields, message):
    with pytest.raises(ValueError, match=message):
        Engine.from_pretrained(model, **fields)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere: there is no such folder"):
        Engine.from_pretrained(tmp_path / "nowhere")


class Client:
    """Collects what an EngineProcess says."""

    def __init__(self, config: EngineConfig) -> None:
        self.changed = threading.Condition()
        self.tokens: dict[int, list[int]] = {}
        self.finished: dict[int, FinishReason] = {}
        self.refused: dict[int, str] = {}
        self.deaths: list[str] = []
        told = Callbacks(self.on_news, self.on_stats, self.on_refusal, self.on_death, on_restart=lambda ready: None)
        self.process = EngineProcess(config, told)
        self.stats: Stats | None = None

    def on_news(self, news):
        with self.changed:
            for delta in news.deltas:
                self.tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
                if delta.finish_reason:
                    assert delta.request_id not in self.finished, "a request ends once"
                    self.finished[delta.request_id] = delta.finish_reason
            self.changed.notify_all()

    def on_stats(self, stats):
        with self.changed:
            self.stats = stats
            self.changed.notify_all()

    def on_refusal(self, refusal):
        with self.changed:
            self.refused[refusal.request_id] = refusal.message
            self.changed.notify_all()

    def on_death(self, how):
        with self.changed:
            self.deaths.append(how)
            self.changed.notify_all()

    def wait_for(self, condition):
        with self.changed:
            assert self.changed.wait_for(condition, timeout=60)


def config(model: Path, **fields) -> EngineConfig:
    return EngineConfig.resolve({"model": str(model), **fields}, relative_to=Path.cwd())


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


def test_heads_that_the_ranks_cannot_share_are_refused_before_a_rank_starts(tmp_path, monkeypatch):
    folder = checkpoints.save(checkpoints.make("llama", heads=4), tmp_path)
    monkeypatch.setattr(ranks, "Child", lambda module: 1 // 0)
    with pytest.raises(ConfigError, match="tensor_parallel: expected a divisor of num_attention_heads 4, got 8"):
        Engine.from_pretrained(folder, tensor_parallel=8)


@pytest.mark.timeout(60)
def test_a_rank_that_dies_before_it_joins_is_named_at_once(model, monkeypatch):
    """The real group would wait ten minutes for it, and this process could have no other one meanwhile."""
    started, over = [], threading.Event()
    monkeypatch.setattr(ranks, "join_group", lambda *_: over.wait(60))
    monkeypatch.setattr(ranks, "Child", lambda module: started.append(Child("nanoflow_backend.nowhere")) or started[-1])
    with pytest.raises(RuntimeError, match=r"rank 1: process \d+ ended with exit code 1"):
        Engine.from_pretrained(model, tensor_parallel=2)
    over.set()
    assert not alive(started[0].pid)


def children(pid: int) -> list[int]:
    """Of all its threads: the one that starts a process is its parent."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def alive(pid: int) -> bool:
    """A zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
