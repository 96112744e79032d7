"""Executor is the interface between the engine's loop and whatever computes its batches.

LocalExecutor computes them on the ranks of this host. Tests and benchmarks have others: one whose model is arithmetic,
one whose device takes no time.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

from nanoflow_backend.kvcache.tier import PageIndex, TransferReport
from nanoflow_backend.runtime.device import Device
from nanoflow_backend.sampling.constraints import Masks
from nanoflow_backend.scheduler.batch import Batch, Sampled


class LaunchedStep(Protocol):
    """A step that was launched and is not collected yet. An executor may keep in it what it likes."""

    @property
    def batch(self) -> Batch: ...


Step = TypeVar("Step", bound=LaunchedStep)


class Executor(Protocol[Step]):
    """Computes steps, in two parts each, in the order of their launches.

    The engine calls launch_forward, launch_tail and collect once for each step, in this order; between the two
    launches of a step it collects the step before, so that masks may depend on what that one sampled.
    """

    @property
    def device(self) -> Device:
        """What rank 0 runs on."""
        ...

    @property
    def num_pages(self) -> int:
        """Size of the KV cache, in pages of `page_tokens` tokens. The same on every rank."""
        ...

    @property
    def page_index(self) -> PageIndex | None:
        """Of where pages outlive the process, on all ranks. Asked for only where there are tiers below the device."""
        ...

    def report_transfers(self) -> TransferReport | None:
        """What has become of transfers since the last step was collected. None: no tiers below the device."""
        ...

    def launch_forward(self, batch: Batch) -> Step:
        """Begin a step: embedding and layers on all of its tokens. It may return before the device is done."""
        ...

    def launch_tail(self, step: Step, masks: Masks | None) -> None:
        """Go on with a step: LM head and sampling, where `masks` (None: nowhere) says which tokens are allowed."""
        ...

    def collect(self, step: Step) -> Sampled:
        """Wait for what a step sampled."""
        ...

    def close(self) -> None:
        """End the processes that the executor has started. No step may follow."""
        ...
