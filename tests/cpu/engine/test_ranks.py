"""Ranks that cannot start, or end: the engine says which, and at once; until then all launch the same."""

import os
import signal
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from support.engine.recorded_launches import FOLDER, RecordingWorker
from support.process_tree import alive, children
from support.waiting import until

from benchmarks.models import checkpoints, tiny_tokenizers
from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.engine import Engine, SamplingParams, local_executor, ranks
from nanoflow_backend.hosts import members
from nanoflow_backend.hosts.members import Members
from nanoflow_backend.process.channel import ChannelClosed
from nanoflow_backend.process.child import Child
from nanoflow_backend.request.request import Request
from nanoflow_backend.text.tokenizer import Tokenizer

DYING_LATER = """
import os
from nanoflow_backend.engine import ranks
def load(*of_a_worker):
    os._exit(9)
ranks.Worker = load
ranks.main()
"""
ABSENT = """
import msgspec, threading
from nanoflow_backend.hosts.messages import Progress
from nanoflow_backend.process.child import Parent
parent = Parent()
parent.receive(msgspec.msgpack.Decoder())
parent.send(Progress())
threading.Event().wait()
"""
DYING = """
import os, msgspec
from nanoflow_backend.hosts.messages import Progress
from nanoflow_backend.process.child import Parent
parent = Parent()
parent.receive(msgspec.msgpack.Decoder())
parent.send(Progress())
os._exit(7)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tiny_tokenizers.llama3(tmp_path_factory.mktemp("model"))
    vocab_size = Tokenizer.from_pretrained(folder).vocab_size
    return checkpoints.save(checkpoints.make("llama", vocab_size=vocab_size), folder)


def test_heads_that_the_ranks_cannot_share_are_refused_before_a_rank_starts(tmp_path, monkeypatch):
    folder = checkpoints.save(checkpoints.make("llama", heads=4), tmp_path)
    monkeypatch.setattr(members, "Child", lambda module: 1 // 0)
    with pytest.raises(ConfigError, match="tensor_parallel: expected a divisor of num_attention_heads 4, got 8"):
        Engine.from_pretrained(folder, tensor_parallel=8)


@pytest.mark.timeout(120)
def test_a_rank_that_dies_before_it_meets_the_others_is_named_at_once_and_leaves_nothing(model, monkeypatch):
    """Neither a process nor a group: the same process starts the next engine."""
    started = []
    with monkeypatch.context() as patch:
        patch.setattr(members, "Child", lambda module: started.append(Child("nanoflow_backend.nowhere")) or started[-1])
        with pytest.raises(RuntimeError, match=r"rank 1: process \d+ ended with exit code 1"):
            Engine.from_pretrained(model, tensor_parallel=2)
    assert not alive(started[0].pid)
    assert not dist.is_initialized()
    Engine.from_pretrained(model, tensor_parallel=2, kv_cache_tokens=1024).close()
    assert not dist.is_initialized()


@pytest.mark.timeout(60)
def test_a_rank_that_dies_on_its_way_to_the_others_is_named_and_leaves_nothing(model, tmp_path, monkeypatch):
    (tmp_path / "dying_rank.py").write_text(DYING)
    deaths = []
    config = EngineConfig.resolve({"model": str(model), "tensor_parallel": 2}, relative_to=tmp_path)
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
        patch.setattr(members, "RANK", "dying_rank")
        patch.setattr(ranks, "MEETING_S", 1.0)
        with pytest.raises(RuntimeError, match=r"rank 1: process \d+ ended with exit code 7"):
            Engine(config, on_rank_death=deaths.append)
    assert "ended with exit code 7" in deaths[0]  # at once: an engine process ends by it, and waits for nobody
    assert not dist.is_initialized()
    Engine.from_pretrained(model, tensor_parallel=2, kv_cache_tokens=1024).close()


@pytest.mark.timeout(60)
def test_a_rank_that_dies_as_it_loads_its_weights_is_named_and_leaves_nothing(model, tmp_path, monkeypatch):
    """Rank 0 waits for it, to know how much memory all of them have."""
    (tmp_path / "dying_later.py").write_text(DYING_LATER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(members, "RANK", "dying_later")
    before = set(children(os.getpid()))
    with pytest.raises(RuntimeError, match=r"^rank 1: process \d+ ended with exit code 9$"):
        Engine.from_pretrained(model, tensor_parallel=2)
    until(lambda: set(children(os.getpid())) == before)
    assert not dist.is_initialized()


@pytest.mark.timeout(60)
def test_a_rank_that_never_comes_to_the_meeting_is_named_within_ten_seconds(model, tmp_path, monkeypatch):
    """It lives and says so, but does not join: as one that waits for its GPU's driver."""
    assert ranks.MEETING_S <= 10
    (tmp_path / "absent_rank.py").write_text(ABSENT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(members, "RANK", "absent_rank")
    monkeypatch.setattr(ranks, "MEETING_S", 0.5)
    monkeypatch.setattr(ranks, "EXPLAINED_S", 0.1)
    before = set(children(os.getpid()))
    with pytest.raises(
        RuntimeError, match=r"did not meet within 0.5 s .*: rank 1, rank 2, rank 3: started, but did not"
    ):
        Engine.from_pretrained(model, tensor_parallel=4)
    until(lambda: set(children(os.getpid())) == before)
    assert not dist.is_initialized()


@pytest.mark.timeout(120)
def test_all_ranks_launch_the_same_in_the_same_order_until_one_is_killed(model, prompts, tmp_path, monkeypatch):
    """Three lanes, of which one has the collectives. Who is killed is named at once, and the other ranks end, too."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setattr(members, "RANK", "support.engine.recorded_launches")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]), prepend=os.pathsep)
    monkeypatch.setattr(local_executor, "Worker", RecordingWorker)
    before, deaths = set(children(os.getpid())), []
    fields = {"model": str(model), "tensor_parallel": 4, "schedule": "nano-batched-2", "kv_cache_tokens": 4096}
    engine = Engine(EngineConfig.resolve(fields, relative_to=tmp_path), on_rank_death=deaths.append)
    others = sorted(set(children(os.getpid())) - before)  # as they were started: ranks 1, 2 and 3
    for number, prompt in enumerate(prompts):
        engine.add(Request(number, prompt, SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)))
    for _ in range(20):
        engine.step()
    until(lambda: len({(tmp_path / str(rank)).read_text() for rank in range(4)}) == 1)  # others may be a launch late
    launched = (tmp_path / "0").read_text().splitlines()
    assert sum(line.startswith("batch") for line in launched) == 20
    assert {line.split()[-1] for line in launched if line[0].isdigit()} == {"compute", "memory", "network"}

    os.kill(others[1], signal.SIGKILL)
    killed_s = time.monotonic()
    with pytest.raises(RuntimeError, match=rf"^rank 2: process {others[1]} ended with SIGKILL$"):
        run_to_its_end(engine)
    assert time.monotonic() - killed_s < 2
    until(lambda: set(children(os.getpid())) == before)
    assert deaths == [f"rank 2: process {others[1]} ended with SIGKILL"]
    engine.close()


def test_a_rank_that_does_not_start_is_named_while_others_wait_for_it(monkeypatch, caplog):
    monkeypatch.setattr(members, "SAID_EVERY_S", 0.1)
    one, other = Future(), Future()
    one.set_result(None)
    threading.Timer(0.35, other.set_result, [None]).start()
    with caplog.at_level("WARNING"):
        members._wait({"rank 1": one, "rank 2": other}, log_missing=True)
    assert "not started within 0 s: rank 2" in caplog.text
    assert "rank 1" not in caplog.text


def run_to_its_end(engine):
    while engine.has_work:
        engine.step()


class Gone:
    """A channel to a process whose end becomes known at some moment."""

    def __init__(self):
        self.known = threading.Event()

    def receive(self, decoder):
        self.known.wait(30)
        raise ChannelClosed("process 7 ended with SIGKILL")

    def close(self):
        pass

    stop = close


def test_kernels_that_wait_for_a_dead_rank_are_ended_before_anybody_is_told_and_what_they_gave_is_an_error():
    said, gone = [], Gone()
    group = object.__new__(ranks.Ranks)
    group.collectives = SimpleNamespace(abort=lambda: said.append("abort"))
    group._on_death = said.append
    group._members = Members({"rank 1": gone}, group._rank_died)
    group.check()
    gone.known.set()
    until(lambda: len(said) == 2)
    assert said == ["abort", "rank 1: process 7 ended with SIGKILL"]
    with pytest.raises(RuntimeError, match=r"^rank 1: process 7 ended with SIGKILL$"):
        group.check()


def test_the_error_of_a_collective_says_whose_end_it_is(monkeypatch):
    """A rank's connections end before its parent knows that it has."""
    group, gone = object.__new__(ranks.Ranks), Gone()
    group._members = Members({"rank 1": gone}, on_death=lambda how: None)

    def reduce():
        with group.errors_explained():
            raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(ranks, "EXPLAINED_S", 0.01)
    with pytest.raises(RuntimeError, match="Connection reset by peer"):
        reduce()  # nobody has ended
    monkeypatch.setattr(ranks, "EXPLAINED_S", 30.0)
    threading.Timer(0.1, gone.known.set).start()
    with pytest.raises(RuntimeError, match=r"^rank 1: process 7 ended with SIGKILL$"):
        reduce()
