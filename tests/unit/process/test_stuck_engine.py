"""An engine process that is stuck: nobody waits for it, and it is killed and followed by another one."""

import functools
import os
import signal
import threading
import time
from collections.abc import Callable

import pytest
from support.process_tree import alive
from support.waiting import until

from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.process import engine_process, outbox, supervisor
from nanoflow_backend.process.callbacks import Callbacks
from nanoflow_backend.process.child import Child
from nanoflow_backend.process.engine_process import EngineError, EngineProcess
from nanoflow_backend.process.supervisor import Supervisor
from nanoflow_backend.request.request import Request
from nanoflow_backend.request.sampling_params import SamplingParams

LIMIT_S = 2.0
ENGINE = """
import sys, time
import msgspec
from nanoflow_backend.process.child import Parent
from nanoflow_backend.process.heart import Heart
from nanoflow_backend.process.messages import Ready, ToEngine
parent = Parent()
start = parent.receive(msgspec.msgpack.Decoder(ToEngine))
heart = Heart(parent.send)
sizes = {"max_model_tokens": 10**6, "num_pages": 9, "page_tokens": 4, "max_running": 9, "queue_room": 10**6}
parent.send(Ready(vocab_size=400, description="", **sizes))
while True:  # it reads no more
    time.sleep(0.05)
    heart.steps += start.config.seed  # 0: a step that is stuck
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts an engine whose steps come back, or do not, and that never reads what it is sent."""
    (tmp_path / "pretending_engine.py").write_text(ENGINE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(Child, "stop", functools.partialmethod(Child.stop, timeout_s=0.2))  # it hears of no stop
    monkeypatch.setattr(
        engine_process, "Child", lambda module, *rest, **options: Child("pretending_engine", *rest, **options)
    )
    started = []

    def start(make: Callable, steps: bool, **told):
        callbacks = {name: lambda *_: None for name in Callbacks.__dataclass_fields__} | told
        config = EngineConfig(model="m", engine_stall_s=LIMIT_S, seed=int(steps))
        engine = make(config, Callbacks(**callbacks))
        started.append(engine)
        engine.start()
        return engine

    yield start
    for engine in started:
        engine.stop()


def test_a_stopped_process_and_a_hanging_step_are_killed_and_long_work_is_not(start):
    deaths = {}
    engines = {
        name: start(EngineProcess, steps, on_death=lambda how, name=name: deaths.update({name: how}))
        for name, steps in (("stopped", True), ("hanging", False), ("working", True))
    }
    os.kill(engines["stopped"].pid, signal.SIGSTOP)
    until(lambda: len(deaths) == 2)
    time.sleep(1)
    for name in ("stopped", "hanging"):
        pid = engines[name].pid
        assert deaths.pop(name) == f"process {pid} was killed: it made no step for 2 s (engine_stall_s)"
        until(lambda pid=pid: not alive(pid))
        with pytest.raises(EngineError, match=r"the engine is gone: process \d+ was killed: it made no step"):
            engines[name].submit(Request(0, [5], SamplingParams()))
    assert deaths == {}
    assert alive(engines["working"].pid)


def test_what_a_stopped_process_does_not_read_holds_nobody_up(start, monkeypatch):
    monkeypatch.setattr(engine_process, "Outbox", lambda child: outbox.Outbox(child, 2**20))
    engine = start(EngineProcess, steps=True)
    request = Request(0, [5] * 100_000, SamplingParams())
    refusals = []

    def client():
        for _ in range(100):  # ten times what may wait
            try:
                engine.submit(request)
            except EngineError as error:
                refusals.append(str(error))
            engine.cancel(0)

    os.kill(engine.pid, signal.SIGSTOP)
    thread = threading.Thread(target=client, daemon=True)
    begun_s = time.monotonic()
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    assert time.monotonic() - begun_s < LIMIT_S, "it waited for the end of the process"
    assert set(refusals) == {"the engine has not read 1 MiB of requests yet: try again later"}
    assert 80 < len(refusals) < 95
    engine.check_room(10**6 - (100 - len(refusals)))  # those that were refused take no room


def test_a_supervised_engine_that_is_stuck_is_not_ready_and_restarted(start, monkeypatch):
    monkeypatch.setattr(supervisor, "FIRST_DELAY_S", 0.0)
    seen, restarted = [], threading.Event()

    def on_death(how):
        with pytest.raises(EngineError) as refused:
            supervised.check_room()
        seen.append((how, supervised.is_ready, str(refused.value)))

    supervised = start(Supervisor, steps=True, on_death=on_death, on_restart=lambda ready: restarted.set())
    os.kill(supervised._engine.pid, signal.SIGSTOP)
    assert supervised.is_ready, "the limit has not passed"
    assert restarted.wait(30)
    ((how, is_ready, refused),) = seen
    assert "it made no step for 2 s (engine_stall_s); restart 1 of 5 is under way: try again later" in how
    assert (is_ready, refused) == (False, how)
    until(lambda: supervised.is_ready)
