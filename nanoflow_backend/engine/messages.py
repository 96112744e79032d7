"""What crosses the socket between the server's stub and the engine process: msgspec structs, never pickle."""

from __future__ import annotations

import msgspec

from nanoflow_backend.config import EngineConfig
from nanoflow_backend.scheduler.batch import Delta
from nanoflow_backend.scheduler.request import Request
from nanoflow_backend.scheduler.stats import SchedulerStats


class Start(msgspec.Struct, frozen=True, tag=True):
    """The first message to a new engine process."""

    config: EngineConfig


class Submit(msgspec.Struct, frozen=True, tag=True):
    request: Request


class Cancel(msgspec.Struct, frozen=True, tag=True):
    request_id: int


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Cancel what runs, report it, and exit."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Every rank has its weights and pages. Answers Start."""

    vocab_size: int
    max_model_tokens: int
    num_pages: int
    page_tokens: int
    description: str  # one line for the log: model, schedule, sizes
    stats: SchedulerStats  # before the first request


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The engine could not start, or broke: the process ends after it."""

    message: str


class Refusal(msgspec.Struct, frozen=True, tag=True):
    """A request that never entered the scheduler."""

    request_id: int
    message: str
    overloaded: bool  # the queue is full; otherwise the request is invalid


class News(msgspec.Struct, frozen=True, tag=True):
    """What one step brought, and how things stand after it."""

    deltas: list[Delta]
    stats: SchedulerStats


ToEngine = Start | Submit | Cancel | Stop
FromEngine = Ready | Failed | Refusal | News
