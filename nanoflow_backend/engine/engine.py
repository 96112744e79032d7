"""Engine joins scheduler and executor into one loop: requests go in, and each step brings tokens of all that run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.settled import Settled
from nanoflow_backend.engine.executor import Executor, LaunchedStep
from nanoflow_backend.engine.kv_events.publisher import open_publisher
from nanoflow_backend.engine.local_executor import LocalExecutor
from nanoflow_backend.engine.settle import settle
from nanoflow_backend.engine.tiers.builder import make_lower_tiers
from nanoflow_backend.request.internal_error import RequestError
from nanoflow_backend.request.request import Request
from nanoflow_backend.request.sampling_params import InvalidRequest
from nanoflow_backend.sampling.constraints import Constraints, Masks
from nanoflow_backend.sampling.grammar import Grammar, Grammars
from nanoflow_backend.sampling.pending_grammars import PendingGrammars
from nanoflow_backend.scheduler.batch import Batch, Delta, FinishReason, Sampled
from nanoflow_backend.scheduler.limits import SchedulerLimits
from nanoflow_backend.scheduler.scheduler import Scheduler
from nanoflow_backend.scheduler.tiers.lower_tiers import LowerTiers
from nanoflow_backend.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)
DRAIN_S = 3.0  # for pages on their way to a lower tier; a process that was told to stop is killed after 5
MakeExecutor = Callable[[Settled, Callable[[str], None]], Executor[Any]]  # the arguments of LocalExecutor
Settle = Callable[[EngineConfig, int | None], Settled]  # those of settle


class Engine:
    """Continuous batching: `add` requests at any time, and call `step` until `has_work` is false.

    Args:
        config: see EngineConfig.
        on_rank_death: called from another thread when a tensor-parallel rank has ended, with what is known of its end.
        make_executor: makes what computes the batches.
        settle: decides what the configuration leaves open.

    Attributes:
        on_scheduled: called in a step, before it is launched, with the requests that begin in it and that a queue
            deadline would have ended else.

    Raises:
        ConfigError: naming what is wrong in the model's folder or the configuration, or what does not fit.
        ScheduleError: the schedule cannot be read, or does not fit the model or the device.
    """

    def __init__(
        self,
        config: EngineConfig,
        on_rank_death: Callable[[str], None] = log.error,
        make_executor: MakeExecutor = LocalExecutor,
        settle: Settle = settle,
    ) -> None:
        self.tokenizer = Tokenizer.find(config.model)  # None: such a model continues token ids
        with ExitStack() as undo:
            self._publisher = open_publisher(config.kv_events)  # an endpoint that is taken is known before the work
            if self._publisher:
                undo.callback(self._publisher.close)
            settled = settle(config, self.tokenizer.eos_id if self.tokenizer else None)
            self.executor = make_executor(settled, on_rank_death)
            undo.pop_all()
        self.config, self.model_config = settled.config, settled.model_config
        self.max_model_tokens = settled.max_model_tokens
        target_ms = self.config.inter_token_target_ms
        limits = SchedulerLimits(
            dense_batch_tokens=self.config.dense_batch_tokens,
            chunk_tokens=self.config.chunk_tokens,
            prompt_tokens=self.config.prompt_tokens,
            max_running=self.config.max_running,
            max_queue_size=self.config.max_queue_size,
            num_pages=self.executor.num_pages,
            page_tokens=self.config.page_tokens,
            max_model_tokens=self.max_model_tokens,
            inter_token_target_s=None if target_ms is None else target_ms / 1e3,
        )
        pages = self._publisher.pages if self._publisher else None
        self._lower = make_lower_tiers(settled, self.executor, pages) if self.config.host_kv_cache_bytes else None
        self.scheduler = Scheduler(
            limits,
            eos_token_ids=self.model_config.eos_token_ids,
            prefix_caching=self.config.prefix_caching,
            priority_aging_s=self.config.priority_aging_s,
            seed=self.config.seed,
            lower=self._lower,
            page_events=pages,
        )
        if self._publisher:
            self._publisher.pages.cleared()  # subscribers may remember what a process before this one had
            self._publisher.publish()
        model = self.model_config
        grammars = Grammars(lambda: self.tokenizer, model.vocab_size, model.eos_token_ids)
        self.constraints = Constraints(model.vocab_size, model.eos_token_ids, grammars)
        self._pending = PendingGrammars(self.scheduler)
        self.on_scheduled: Callable[[list[int]], None] = lambda request_ids: None
        self.in_flight: LaunchedStep | None = None
        self.last_batch: Batch | None = None  # of the last step; None: it launched nothing

    @classmethod
    def from_pretrained(cls, model: str | Path, **config: Any) -> Engine:
        """The engine for a Hugging Face folder; `config` are fields of EngineConfig.

        Raises:
            ConfigError: naming what is wrong in the folder or the fields.
        """
        return cls(EngineConfig.resolve({"model": str(model), **config}, relative_to=Path.cwd()))

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self.in_flight is not None

    @property
    def description(self) -> str:
        """One line for people: what runs here, and how."""
        shape, config = self.model_config, self.config
        precision = f"{config.precision}{', products in FP8' if shape.quantization else ''}"
        paced = f", {config.prompt_tokens} of prompts" if config.prompt_tokens < config.dense_batch_tokens else ""
        way = f" over {config.collectives}" if config.tensor_parallel > 1 else ""
        return (
            f"{shape.architecture}, {shape.num_layers} layers, hidden {shape.hidden_size}, {precision}, "
            f"TP {config.tensor_parallel}{way} on {self.executor.device.name}; schedule {config.schedule}, "
            f"B_dense {config.dense_batch_tokens}{paced}; "
            f"{self.executor.num_pages} pages of {config.page_tokens} tokens"
        )

    def has_room(self, sequences: int = 1) -> bool:
        """The queue takes one more request, of so many sequences."""
        return self.scheduler.queue_room >= sequences

    def add(self, *requests: Request) -> None:
        """Queue requests, all of them or none; one with a grammar waits until that is compiled.

        Raises: InvalidRequest, InternalError, QueueFull.
        """
        compiling: dict[int, Future[Grammar]] = {}
        for request in requests:
            params = request.params
            self._check_ids("prompt", request.prompt)
            self._check_ids("logit_bias", params.logit_bias)
            self._check_ids("allowed_token_ids", params.allowed_token_ids)
            self._check_ids("bad_words_token_ids", list(chain.from_iterable(params.bad_words_token_ids)))
            grammar = self.constraints.prepare(params)
            if grammar is not None and not grammar.done():  # asked once: it may be done in the next moment
                compiling[request.id] = grammar
            elif grammar is not None:
                grammar.result()
        self.scheduler.add(*requests, held=compiling)
        for request_id, grammar in compiling.items():
            self._pending.hold(request_id, grammar)

    def cancel(self, request_id: int, reason: FinishReason = FinishReason.CANCELLED, index: int | None = None) -> None:
        """End a request, or one of its sequences, early; the last delta of each gives the reason.

        What has ended is left alone.
        """
        if index is None:
            self._pending.forget(request_id)
        self.scheduler.cancel(request_id, reason, index)

    def take_refused(self) -> list[tuple[int, RequestError]]:
        """Requests that `add` took and that cannot be served after all, since the last call: for their grammars.

        Their last deltas, which say "refused", are handed over by a later step.
        """
        return self._pending.take_refused()

    def cancel_all(self) -> None:
        """End every request; `step` reports it."""
        for request_id in self.scheduler.live_ids:
            self.cancel(request_id)

    def step(self) -> list[Delta]:
        """Launch one batch, then collect the one before it: EOS is seen one step late (paper section 4.2.1).

        Raises:
            RuntimeError: there is work, but nothing that could run.
        """
        self._pending.release_compiled()
        batch = self.scheduler.schedule()  # ints; None when nothing can run
        self.on_scheduled(self.scheduler.begun)
        launched = self.executor.launch_forward(batch) if batch else None
        results = self._collect(self.in_flight)  # of the step before
        deltas = self.scheduler.retire(results)
        if launched:
            self.executor.launch_tail(launched, self._masks(launched.batch))  # LM head and sampling
        self.in_flight = launched
        self.last_batch = batch
        if launched and not self.config.async_scheduling:
            deltas += self.scheduler.retire(self._collect(launched))
            self.in_flight = None
        if self._publisher:
            self._publisher.publish()
        if not (batch or results or deltas) and self.scheduler.has_work:
            if not self._pending:  # as after a step that was interrupted
                raise RuntimeError(f"there is work, and nothing can run: {self.scheduler.stats}")
            self._pending.wait()
        return deltas

    def _check_ids(self, field: str, ids: Collection[int]) -> None:
        vocab_size = self.model_config.vocab_size
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            raise InvalidRequest(f"{field}: expected token ids in 0..{vocab_size - 1}, got {min(ids)}..{max(ids)}")

    def _collect(self, launched: LaunchedStep | None) -> Sampled | None:
        if launched is None:
            return None
        sampled = self.executor.collect(launched)
        if self.constraints:
            self.constraints.observe(launched.batch.sampled_slots, sampled.token_ids)
        return sampled

    def _masks(self, batch: Batch) -> Masks | None:
        """What the rows of a batch may sample, now that the step before has come back."""
        self.constraints.admit(batch.admitted)
        if not self.constraints:
            return None
        slots = batch.sampled_slots
        masks = self.constraints.masks(slots)
        if masks is None:
            return None
        for slot, why in self.constraints.broken(slots).items():
            self._pending.refuse(self.scheduler.id_at(slot), why)
        return masks

    def drain(self, timeout_s: float | None = None) -> bool:
        """Step until no page is on its way to a lower tier, with no request live. False: time was up first."""
        deadline_s = time.monotonic() + (DRAIN_S if timeout_s is None else timeout_s)
        while self.has_work and time.monotonic() < deadline_s:
            self.step()
        return not self.has_work

    def close(self) -> None:
        """End the processes of the other ranks, and tell no more of pages. No step may follow.

        Pages on their way to lower tiers are given DRAIN_S to get there. Others count as dropped, and the log says so.
        """
        if self._lower is not None:
            self._end_transfers(self._lower)
        self.executor.close()
        if self._publisher:
            self._publisher.close()

    def _end_transfers(self, lower: LowerTiers) -> None:
        self.cancel_all()
        try:
            self.drain()
        except Exception as error:  # as when a rank has died: the engine is closed all the same
            log.warning("pages on their way to other tiers stay where they are: %s", error)
        if lost := lower.abandon():
            log.warning("%d pages had not come to host memory or the disk when the engine ended", lost)
