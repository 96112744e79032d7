"""These msgspec structs cross the socket between the server's stub and the engine process; nothing is ever pickled."""

from __future__ import annotations

from typing import Literal

import msgspec

from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.request.request import Request
from nanoflow_backend.scheduler.batch import Delta, FinishReason
from nanoflow_backend.scheduler.observed import Observed
from nanoflow_backend.scheduler.stats import SchedulerStats


class Start(msgspec.Struct, frozen=True, tag=True):
    """The first message to a new engine process."""

    config: EngineConfig


class Submit(msgspec.Struct, frozen=True, tag=True):
    """The prompts of one client's request: all of them are queued, or each is refused."""

    requests: tuple[Request, ...]


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """End a request early; STOP where its text had a stop string, which only the stub can see."""

    request_id: int
    reason: FinishReason = FinishReason.CANCELLED
    index: int | None = None  # of one sequence; None: all of the request's


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Cancel what runs, report it, and exit."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Every rank has its weights and pages. Answers Start."""

    vocab_size: int
    max_model_tokens: int
    num_pages: int
    page_tokens: int
    max_running: int  # sequences
    description: str  # one line for the log: model, schedule, sizes
    queue_room: int  # before the first request; see Load


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The engine could not start, or broke: the process ends after it."""

    message: str


class Refusal(msgspec.Struct, frozen=True, tag=True):
    """A request that cannot be served: nothing more of it is to be shown."""

    request_id: int
    message: str
    reason: Literal["invalid", "queue_full", "internal"]  # as in the metrics; internal: a fault of the engine


class Load(msgspec.Struct, frozen=True, array_like=True):
    """What the engine has to do. What was submitted and not received yet will take some of its queue's room."""

    running: int  # sequences: `n` of a request
    waiting: int  # in the queue
    used_pages: int  # held by those that run
    room: int  # of the queue, for so many more
    received: int  # so far, refused ones too


class News(msgspec.Struct, frozen=True, tag=True):
    """What one step brought, and the load after it. Without deltas when only the load has changed, or the work ends.

    Or, before a step that may be long, the load and the requests that could have been too late to begin and begin.
    """

    deltas: list[Delta]
    load: Load
    begun: list[int] = []


class Stats(msgspec.Struct, frozen=True, tag=True):
    """How things stand. Comes every STATS_PERIOD_S while there is work, and when the work ends."""

    scheduler: SchedulerStats
    observed: Observed


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """The engine process runs. Comes every STATS_PERIOD_S once it is ready, also in a step that is stuck."""

    steps: int  # of the engine, that came back
    idle: bool  # it waits for messages, so the last Stats are how things stand


STATS_PERIOD_S = 0.5  # well below the period of any collector; encoding takes 3 us

ToEngine = Start | Submit | Cancel | Stop
FromEngine = Ready | Failed | Refusal | News | Stats | Heartbeat
