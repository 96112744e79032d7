"""Schedulers of a few pages, requests for them, and steps whose tokens a test names: 7 is an ordinary one, 0 is EOS."""

from __future__ import annotations

from typing import Any

from msgspec import structs

from nanoflow_backend.request.request import Request
from nanoflow_backend.request.sampling_params import SamplingParams
from nanoflow_backend.scheduler.batch import Batch, Delta, Sampled
from nanoflow_backend.scheduler.limits import SchedulerLimits
from nanoflow_backend.scheduler.scheduler import Scheduler

EOS = 0


def make(**changes: Any) -> Scheduler:
    settings: dict[str, Any] = {
        "dense_batch_tokens": 16,
        "chunk_tokens": 16,
        "max_running": 4,
        "max_queue_size": 8,
        "num_pages": 32,
        "page_tokens": 4,
        "max_model_tokens": 64,
        "eos_token_ids": [EOS],
        "clock": lambda: 0.0,
    }
    settings |= changes
    settings = {"prompt_tokens": settings["dense_batch_tokens"]} | settings
    of_limits = settings.keys() & SchedulerLimits.__dataclass_fields__.keys()
    limits = SchedulerLimits(**{name: settings.pop(name) for name in of_limits})
    return Scheduler(limits, **settings)


def request(
    id: int, prompt: int | list[int], *, priority: int = 0, deadline: float | None = None, **params: Any
) -> Request:
    ids = [100 * (id + 1) + i for i in range(prompt)] if isinstance(prompt, int) else prompt
    return Request(id, ids, SamplingParams(**{"max_tokens": 10} | params), priority, deadline)


def formed(scheduler: Scheduler) -> Batch:
    batch = scheduler.schedule()
    scheduler.check()
    assert batch is not None
    return batch


def returned(scheduler: Scheduler, batch: Batch, *token_ids: int) -> list[Delta]:
    """Retire a batch with these tokens, or 7 for all."""
    deltas = scheduler.retire(Sampled(batch.step, list(token_ids) or [7] * len(batch.sampled_slots)))
    scheduler.check()
    return without_accounts(deltas)


def without_accounts(deltas: list[Delta]) -> list[Delta]:
    """Last deltas have an account, which has tests of its own (test_observer.py)."""
    assert all((delta.account is None) == (delta.finish_reason is None) for delta in deltas)
    return [structs.replace(delta, account=None) for delta in deltas]


def step(scheduler: Scheduler, *token_ids: int) -> list[Delta]:
    """A step whose results come back before the next."""
    return returned(scheduler, formed(scheduler), *token_ids)


def finish(scheduler: Scheduler) -> dict[int, list[int]]:
    """Run until nothing is left. Returns the tokens of each request."""
    tokens: dict[int, list[int]] = {}
    while scheduler.has_work:
        for delta in step(scheduler):
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
    return tokens
