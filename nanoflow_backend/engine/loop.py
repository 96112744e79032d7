"""This module is the engine process: it takes messages, steps the engine, and sends what each step brought.

EngineProcess starts it as `python -m`.
"""

from __future__ import annotations

import gc
import logging
import os
import time
import traceback
from typing import TYPE_CHECKING

import msgspec

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.engine.energy import measure_energy
from nanoflow_backend.process import logs
from nanoflow_backend.process.child import Parent
from nanoflow_backend.process.heart import Heart
from nanoflow_backend.process.messages import (
    STATS_PERIOD_S,
    Cancel,
    Failed,
    Ready,
    Refusal,
    Start,
    Stats,
    Stop,
    Submit,
    ToEngine,
)
from nanoflow_backend.process.reporter import Reporter
from nanoflow_backend.request.internal_error import InternalError
from nanoflow_backend.request.sampling_params import InvalidRequest
from nanoflow_backend.schedule.plan import ScheduleError
from nanoflow_backend.scheduler.waiting_queue import QueueFull

if TYPE_CHECKING:
    from nanoflow_backend.engine.engine import Engine, MakeExecutor

log = logging.getLogger("nanoflow_backend.engine.loop")  # as a program it has another name


def main(make_executor: MakeExecutor | None = None) -> None:
    """Run until told to stop, or until the process that started this one ends. It never returns.

    `make_executor`: None is LocalExecutor.
    """
    logs.configure()
    gc.disable()  # there is no garbage among torch's modules, and to look for it takes a tenth of the time of a start
    from nanoflow_backend.engine.engine import Engine
    from nanoflow_backend.engine.local_executor import LocalExecutor

    gc.enable()
    parent = Parent()
    decoder = msgspec.msgpack.Decoder(ToEngine)
    try:
        start: Start = parent.receive(decoder)
        make = make_executor or LocalExecutor
        engine = Engine(start.config, on_rank_death=lambda how: fail(parent, how), make_executor=make)
        measure_energy(engine)
        gc.collect()
        gc.freeze()  # what lives from here on is small: a full collection took 12 ms every hundred steps before
        parent.send(ready(engine))
        run(engine, parent, decoder)
    except (ConfigError, ScheduleError) as error:  # it names what is wrong, and where
        log.error("%s", error)
        fail(parent, f"{type(error).__name__}: {error}")
    except Exception as error:
        log.error("%s", traceback.format_exc())
        fail(parent, f"{type(error).__name__}: {error}")
    os._exit(0)  # all is closed: taking torch and the interpreter apart is 0.3 s of work, on a loaded host 1.7 s


def fail(parent: Parent, why: str) -> None:
    """From any thread: the main one may wait for a dead rank in a collective."""
    parent.send(Failed(why))
    os._exit(1)


def ready(engine: Engine) -> Ready:
    return Ready(
        vocab_size=engine.model_config.vocab_size,
        max_model_tokens=engine.max_model_tokens,
        num_pages=engine.executor.num_pages,
        page_tokens=engine.config.page_tokens,
        max_running=engine.config.max_running,
        description=engine.description,
        queue_room=engine.scheduler.queue_room,
    )


def run(engine: Engine, parent: Parent, decoder: msgspec.msgpack.Decoder[ToEngine]) -> None:
    """Until told to stop: all messages that have come, then one step; wait for a message when there is no work."""
    heart = Heart(parent.send)
    stopping = False
    stats_due_s = 0.0
    reporter = Reporter(parent.send, engine.scheduler)
    engine.on_scheduled = reporter.scheduled
    while not stopping or engine.scheduler.has_requests:  # pages that still move are for `close`
        while parent.has_message() or not engine.has_work:
            heart.idle = not engine.has_work
            message = parent.receive(decoder)
            heart.idle = False
            match message:
                case Submit(requests):
                    reporter.received += sum(request.params.n for request in requests)
                    try:
                        engine.add(*requests)
                    except (InvalidRequest, InternalError, QueueFull) as error:
                        for request in requests:
                            parent.send(refusal(request.id, error))
                        reporter.report()  # with nothing else to do no step brings it
                case Cancel(request_id, reason, index):
                    engine.cancel(request_id, reason, index)
                case Stop():
                    stopping = True
                    engine.cancel_all()
                    break
        deltas = engine.step()
        heart.steps += 1
        for request_id, why in engine.take_refused():
            parent.send(refusal(request_id, why))
        reporter.stepped(deltas, engine.has_work)
        if (now_s := time.monotonic()) >= stats_due_s or not engine.has_work:  # pages come free after the last delta
            parent.send(Stats(engine.scheduler.stats, engine.scheduler.observer.observed))
            stats_due_s = now_s + STATS_PERIOD_S
    engine.close()


def refusal(request_id: int, error: InvalidRequest | InternalError | QueueFull) -> Refusal:
    match error:
        case QueueFull():
            return Refusal(request_id, str(error), "queue_full")
        case InternalError():
            return Refusal(request_id, str(error), "internal")
    return Refusal(request_id, str(error), "invalid")


if __name__ == "__main__":
    main()
