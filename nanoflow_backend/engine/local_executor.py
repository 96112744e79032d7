"""LocalExecutor computes batches on the ranks of a group: rank 0 in this process, the others in theirs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from msgspec.structs import replace

from nanoflow_backend.config.settled import Settled
from nanoflow_backend.engine.ranks import Ranks
from nanoflow_backend.engine.worker import InFlightStep, Worker
from nanoflow_backend.kvcache.tier import PageIndex, TransferReport
from nanoflow_backend.runtime.collectives.protocol import Collectives
from nanoflow_backend.runtime.device import Device
from nanoflow_backend.runtime.rank_gpu import stay_near_gpu
from nanoflow_backend.sampling.constraints import Masks
from nanoflow_backend.scheduler.batch import Batch, Sampled


class LocalExecutor:
    """An Executor (see there). Every batch, and the masks of its tail, go to all ranks; rank 0 alone is collected.

    Args:
        on_rank_death: called from another thread when a rank has ended, with what is known of its end.
        collectives: of rank 0 that runs alone (see Emulated): no other rank is started. None: the ranks make theirs.

    Raises:
        ConfigError: the model, its KV cache or its workspace does not fit.
        RankError: another rank could not start, with its number and what it said.
    """

    def __init__(
        self, settled: Settled, on_rank_death: Callable[[str], None], collectives: Collectives | None = None
    ) -> None:
        has_others = settled.config.tensor_parallel > 1 and collectives is None
        self._cores = os.sched_getaffinity(0)
        self._ranks = Ranks(settled, on_rank_death) if has_others else None
        self._errors_explained = self._ranks.errors_explained if self._ranks else contextlib.nullcontext[None]
        try:
            if self._ranks and settled.config.device == "cuda":
                stay_near_gpu(
                    rank=0
                )  # before any memory is touched; after the other ranks, which would stay there, too
            with self._errors_explained():
                self.worker = Worker(settled, collectives=self._ranks.collectives if self._ranks else collectives)
            if self._ranks:
                self._ranks.wait_until_ready()
        except Exception:
            if self._ranks:
                self._ranks.close()
            raise

    @property
    def device(self) -> Device:
        return self.worker.device

    @property
    def num_pages(self) -> int:
        return self.worker.num_pages

    @property
    def page_index(self) -> PageIndex | None:
        own = self.worker.page_store
        return self._ranks.index_of_all(own) if self._ranks and own is not None else own

    def report_transfers(self) -> TransferReport | None:
        return self._joined(self.worker.report_transfers())

    def launch_forward(self, batch: Batch) -> InFlightStep:
        with self._errors_explained():
            if self._ranks:
                self._ranks.broadcast(batch)
            return self.worker.launch_forward(batch)

    def launch_tail(self, step: InFlightStep, masks: Masks | None) -> None:
        with self._errors_explained():
            if self._ranks:
                self._ranks.broadcast(masks)
            self.worker.launch_tail(step, masks)

    def collect(self, step: InFlightStep) -> Sampled:
        with self._errors_explained():
            sampled = self.worker.collect(step)
        if self._ranks is None:
            return sampled
        self._ranks.check()
        return replace(sampled, transfers=self._joined(sampled.transfers))

    def _joined(self, report: TransferReport | None) -> TransferReport | None:
        """Of all ranks, where that of rank 0 is this."""
        return self._ranks.join_reports(report) if self._ranks and report is not None else report

    def close(self) -> None:
        self.worker.close()
        if self._ranks:
            self._ranks.close()
            os.sched_setaffinity(0, self._cores)
