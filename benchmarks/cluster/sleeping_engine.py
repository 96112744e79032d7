"""The sleeping engine is a real one whose executor computes nothing: a step takes as long as one says, and no CPU time.

Its tokens are arithmetic on the request's prompt and their position, so they are the same in any batch and on any node,
and a line that was mixed up with another does not have the right ones. It needs prefix_caching off, and no preemptions.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple
from zlib import crc32

from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.scheduler.batch import Batch, Sampled

if TYPE_CHECKING:
    from nanoflow_backend.config.settled import Settled
    from nanoflow_backend.engine import Engine
    from nanoflow_backend.sampling.constraints import Masks

FIRST_ID, IDS = 256, 512  # of the demo model, none of them special


class SleepingStep(NamedTuple):
    batch: Batch
    sampled: Sampled
    ends_s: float


class SleepingExecutor:
    """An Executor (see there) whose steps take `step_s` one after the other, as on a device."""

    def __init__(self, settled: Settled, on_rank_death: Callable[[str], None], *, step_s: float) -> None:
        tokens = settled.config.kv_cache_tokens
        assert tokens is not None, "measured on GPUs only"
        self.num_pages = tokens // settled.config.page_tokens
        self.device = SimpleNamespace(kind="cpu", name="sleeps", sms=None)
        self._step_s = step_s
        self._idle_from_s = 0.0  # the device, once all that was launched is done
        self._prompts: dict[int, int] = {}  # a digest of each, by slot

    def launch_forward(self, batch: Batch) -> SleepingStep:
        ends = dict(zip(batch.decode_slots, batch.decode_positions, strict=True))
        for chunk in batch.prefills:
            before = self._prompts[chunk.slot] if chunk.start else 0
            self._prompts[chunk.slot] = crc32(array("q", chunk.token_ids), before)
            ends[chunk.slot] = chunk.start + len(chunk.token_ids) - 1
        token_ids = [
            FIRST_ID + (self._prompts[slot] ^ ends[slot] * 2_654_435_761) % 1_000_003 % IDS
            for slot in batch.sampled_slots
        ]
        self._idle_from_s = max(self._idle_from_s, time.monotonic()) + self._step_s
        return SleepingStep(batch, Sampled(batch.step, token_ids, {}, []), self._idle_from_s)

    def launch_tail(self, step: SleepingStep, masks: Masks | None) -> None: ...

    def collect(self, step: SleepingStep) -> Sampled:
        time.sleep(max(0.0, step.ends_s - time.monotonic()))
        return step.sampled

    def close(self) -> None: ...


def make_engine(config: EngineConfig, step_s: float) -> Engine:
    """A sleeping engine; importable, so that the nodes of a cluster can make one."""
    from nanoflow_backend.engine import Engine  # torch: the command on a cluster does without

    return Engine(config, make_executor=partial(SleepingExecutor, step_s=step_s))
