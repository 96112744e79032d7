"""Callbacks are what the owner of an engine process wants to be told, and how it is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nanoflow_backend.process.messages import Heartbeat, News, Ready, Refusal, Stats


@dataclass(frozen=True)
class Callbacks:
    """Called on threads of the process's owner, one at a time for each process; each must be quick."""

    on_news: Callable[[News], None]  # what a step brought
    on_stats: Callable[[Stats], None]  # how things stand, from time to time
    on_heartbeat: Callable[[Heartbeat], None]  # the process runs; twice a second
    on_refusal: Callable[[Refusal], None]  # a request cannot be served; deltas of it that follow mean nothing
    on_death: Callable[[str], None]  # the process is gone without having been asked, and how; nothing more will come
    on_restart: Callable[[Ready], None]  # the next process is ready; before anything of it. Of a Supervisor only
