"""Supervisor: deaths, restarts and stops, of processes that only pretend."""

import threading

import pytest

from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.process import supervisor as module
from nanoflow_backend.process.callbacks import Callbacks
from nanoflow_backend.process.engine_process import EngineError
from nanoflow_backend.process.messages import Ready
from nanoflow_backend.process.supervisor import Supervisor

READY = Ready(
    vocab_size=400, max_model_tokens=100, num_pages=10, page_tokens=4, max_running=8, description="fake", queue_room=9
)


class Process:
    """The n-th start does what the n-th entry of `starts` says: "ready", "hang", or a message to fail with."""

    def __init__(self, made, starts, on_death):
        self.start_ = starts[min(len(made), len(starts) - 1)]
        self.on_death, self.requests, self.stopped = on_death, [], threading.Event()
        made.append(self)

    def start(self):
        if self.start_ == "hang":
            assert self.stopped.wait(30)
            raise EngineError("stopped while it started")
        if self.start_ != "ready":
            raise EngineError(self.start_)
        return READY

    def check_room(self, sequences):
        pass

    def submit(self, *requests):
        self.requests += requests

    def stop(self):
        self.stopped.set()

    def die(self):
        """As the reader thread of a process would say it."""
        reader = threading.Thread(target=self.on_death, args=("process 7 ended with SIGKILL",))
        reader.start()
        reader.join()


class World:
    def __init__(self, monkeypatch, *starts, **config):
        self.made, self.restarts, self.deaths = [], [], []
        monkeypatch.setattr(
            module,
            "EngineProcess",
            lambda *arguments: Process(self.made, starts, arguments[1].on_death),
        )
        self.supervisor = Supervisor(
            EngineConfig(model="m", **config),
            Callbacks(None, None, None, None, self.deaths.append, self.restarts.append),
        )

    def settle(self):
        self.supervisor._restarting.join(30)


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(module, "FIRST_DELAY_S", 0.0)


def test_a_process_that_dies_is_followed_by_another(monkeypatch, at_once):
    world = World(monkeypatch, "ready", "no memory", "ready")
    assert not world.supervisor.is_ready
    assert world.supervisor.start() == READY
    assert world.supervisor.is_ready
    world.made[0].die()
    world.settle()
    assert world.deaths == [
        "the engine is gone: process 7 ended with SIGKILL; restart 1 of 5 is under way: try again later"
    ]
    assert world.made[0].stopped.is_set()
    assert world.supervisor.is_ready
    assert world.restarts == [READY]
    world.supervisor.submit("a request")
    assert [process.requests for process in world.made] == [[], [], ["a request"]]


def test_meanwhile_it_refuses_and_is_not_ready(monkeypatch):
    monkeypatch.setattr(module, "FIRST_DELAY_S", 30.0)
    world = World(monkeypatch, "ready")
    world.supervisor.start()
    world.made[0].die()
    assert not world.supervisor.is_ready
    with pytest.raises(EngineError, match="SIGKILL; restart 1 of 5 is under way"):
        world.supervisor.check_room()
    world.supervisor.stop()  # and does not wait for the restart
    assert len(world.made) == 1


def test_the_time_before_a_restart_doubles_up_to_a_limit(monkeypatch):
    delays_s = []
    world = World(monkeypatch, "ready", "broken", max_engine_restarts=9)
    monkeypatch.setattr(world.supervisor._stopping, "wait", delays_s.append)
    world.supervisor.start()
    world.made[0].die()
    world.settle()
    assert delays_s == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_it_gives_up_after_so_many_and_says_so(monkeypatch, at_once):
    world = World(monkeypatch, "ready", "no memory", max_engine_restarts=2)
    world.supervisor.start()
    world.made[0].die()
    world.settle()
    assert len(world.made) == 3
    assert not world.supervisor.is_ready
    message = r"no memory; it was restarted 2 times \(max_engine_restarts\): reload the model"
    with pytest.raises(EngineError, match=message):
        world.supervisor.check_room()


def test_without_restarts_a_death_is_the_end(monkeypatch):
    world = World(monkeypatch, "ready", max_engine_restarts=0)
    world.supervisor.start()
    world.made[0].die()
    world.settle()
    assert len(world.made) == 1
    assert "reload the model" in world.deaths[0]


@pytest.mark.parametrize(("lived_s", "restarts"), [(59.0, 1), (61.0, 2)])
def test_deaths_that_are_far_apart_do_not_add_up(monkeypatch, at_once, lived_s, restarts):
    now_s = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now_s)
    world = World(monkeypatch, "ready", max_engine_restarts=1)
    world.supervisor.start()
    for _ in range(2):
        now_s += lived_s
        world.made[-1].die()
        world.settle()
    assert len(world.made) == 1 + restarts
    assert world.supervisor.is_ready is (restarts == 2)


def test_a_first_start_that_fails_is_not_tried_again(monkeypatch):
    world = World(monkeypatch, "no weights")
    with pytest.raises(EngineError, match="no weights"):
        world.supervisor.start()
    assert len(world.made) == 1


def test_a_stop_ends_a_restart_that_hangs(monkeypatch, at_once):
    world = World(monkeypatch, "ready", "hang")
    world.supervisor.start()
    world.made[0].die()
    while len(world.made) < 2:
        threading.Event().wait(0.001)
    world.supervisor.stop()
    assert not world.supervisor._restarting.is_alive()
    assert not world.supervisor.is_ready
    assert len(world.made) == 2
