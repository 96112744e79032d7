"""The Scheduler takes requests from queue to last delta: each call of `schedule` decides one step, in ints."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from itertools import chain

from nanoflow_backend.kvcache.page_events import PageEvents
from nanoflow_backend.request.request import Request
from nanoflow_backend.request.sampling_params import InvalidRequest
from nanoflow_backend.scheduler.account import Account
from nanoflow_backend.scheduler.batch import Batch, Delta, FinishReason, Sampled, TokenLogprobs
from nanoflow_backend.scheduler.deadlines import Deadlines
from nanoflow_backend.scheduler.forecast.length_forecast import Forecast, LengthForecast
from nanoflow_backend.scheduler.limits import SchedulerLimits
from nanoflow_backend.scheduler.observer import Observer
from nanoflow_backend.scheduler.pace import Pace
from nanoflow_backend.scheduler.page_account import PageAccount
from nanoflow_backend.scheduler.sequence import Sequence, State
from nanoflow_backend.scheduler.sequence_factory import SequenceFactory
from nanoflow_backend.scheduler.slots import Slots
from nanoflow_backend.scheduler.stats import SchedulerStats
from nanoflow_backend.scheduler.step_planner import StepPlanner
from nanoflow_backend.scheduler.steps_in_flight import StepsInFlight
from nanoflow_backend.scheduler.tiers.lower_tiers import LowerTiers
from nanoflow_backend.scheduler.waiting_queue import QueueFull, WaitingQueue, check_can_wait


class Scheduler:
    """Continuous batching over a paged cache (paper, section 4.2).

    The engine calls `schedule`, launches the batch, and calls `retire` with the results of the batch before it, or
    of the same one: then nothing is in flight while a batch is formed. Every batch must come back, in order.

    A step takes one token of every decoding request, then prefill chunks, at most `chunk_tokens` of one request and
    `prompt_tokens` of all, until it has `dense_batch_tokens` or would take longer than `inter_token_target_s`. A
    request takes the pages of its whole prompt when it is admitted, so only decodes ever wait for a page. When they do,
    the request last in service order is preempted: it gives its pages back, and later computes again what it knows. The
    request first in order is never preempted, so every request finishes.

    Attributes:
        begun: of the requests with a queue deadline, those that the last batch admits.

    With `lower` tiers, what pages hold is stored there beside later steps, and loaded for a request that begins with
    the same. Such a request is computed from its front meanwhile, or waits, whichever ends sooner.
    `page_events` are told which pages requests can find on the device.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        *,
        eos_token_ids: Iterable[int],
        prefix_caching: bool = True,
        priority_aging_s: float = 60.0,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
        forecast: Forecast | None = None,
        lower: LowerTiers | None = None,
        page_events: PageEvents | None = None,
    ) -> None:
        self._max_queue_size = limits.max_queue_size
        self._eos_token_ids = frozenset(eos_token_ids)
        self._factory = SequenceFactory(
            limits.max_model_tokens, limits.cache_tokens, self._eos_token_ids, seed, priority_aging_s
        )
        self._clock = clock
        self._forecast = forecast or LengthForecast()
        self._lower = lower
        self._account = account = PageAccount(limits.num_pages, limits.page_tokens, prefix_caching, lower, page_events)
        self._pool = account.pool
        self.observer = Observer(clock, limits.dense_batch_tokens)
        self.observer.rates = lower.rates if lower else None
        target_s = limits.inter_token_target_s
        self.observer.pace = pace = None if target_s is None else Pace(target_s, limits.prompt_tokens)

        self._live: dict[int, list[Sequence]] = {}  # by request id; each until its last delta is handed over
        self._deadlines = Deadlines()
        self.begun: list[int] = []
        self._pending_deltas: list[Delta] = []  # last deltas of requests that ended between steps
        self._waiting = WaitingQueue()
        self._slots = Slots(limits.max_running)
        self._in_flight = StepsInFlight()
        self._planner = StepPlanner(
            self._waiting, self._slots, account, self._in_flight, self.observer, self._forecast, limits, pace
        )
        self._finished = 0
        self._overshoot_tokens = 0

    def add(self, *requests: Request, held: Collection[int] = ()) -> None:
        """Queue requests, all of them or none; those whose ids are `held` are admitted after `release` only.

        The first sequence of each goes first: when that one's prompt is in the pages, the others share it.

        Raises:
            InvalidRequest: one of them could never run, or all together could never wait; the message names the field
                and what was expected.
            QueueFull: too many are waiting.
        """
        wanted = sum(request.params.n for request in requests)
        check_can_wait(len(requests), wanted, self._max_queue_size)
        now_s = self._clock()
        sequences: dict[int, list[Sequence]] = {}
        for request in requests:
            if request.id in self._live or request.id in sequences:
                raise InvalidRequest(f"id: expected one that is not in use, got {request.id}")
            arrived_s = now_s if request.arrived_s is None else request.arrived_s
            sequences[request.id] = self._factory.make_sequences(request, arrived_s)
            for s in sequences[request.id]:
                self.observer.arrived(s, arrived_s)
        if wanted > self.queue_room:
            raise QueueFull(self.waiting, self.queue_room, wanted)
        for request in requests:
            for s in sequences[request.id]:
                self._waiting.hold(s)
            if request.id not in held:
                self._waiting.release(sequences[request.id][:1])
            self._deadlines.add(request)
        self._live |= sequences
        if self._planner.backlog or not self._slots.free:
            for request in requests:
                self._account.prefetch(sequences[request.id][0])

    def forget_lengths(self) -> None:
        """Forget how long outputs were, as if none had come yet: for another workload that is to be measured."""
        self._forecast.forget()

    def release(self, request_id: int) -> None:
        """A held request may be admitted. An id that is unknown or has ended is left alone."""
        self._waiting.release(self._live.get(request_id, [])[:1])

    def cancel(self, request_id: int, reason: FinishReason = FinishReason.CANCELLED, index: int | None = None) -> bool:
        """End a request, or one of its sequences; `retire` hands over the last delta of each.

        What is unknown or has ended is left alone. Returns whether there was something to end.
        """
        ended = False
        for s in self._live.get(request_id, ()):
            if s.finish_reason is None and index in (None, s.index):
                ended = True
                end = (reason, None, s.cached_tokens, s.index)
                self._pending_deltas.append(Delta(request_id, (), None, *end, account=self._finish(s, reason)))
        return ended

    def id_at(self, slot: int) -> int:
        """The request in a slot. Raises: KeyError, there is none."""
        return self._slots.at(slot).id

    @property
    def waiting(self) -> int:
        """Sequences in the queue, held ones too."""
        return len(self._waiting)

    @property
    def queue_room(self) -> int:
        """Sequences that may still come: what the queue has room for and, unless some have to wait, free slots."""
        spare = 0 if self._planner.backlog else len(self._slots.free)
        return max(0, self._max_queue_size + spare - self.waiting)

    @property
    def has_requests(self) -> bool:
        """Some request has not ended, or its last delta was not handed over, or it still holds pages."""
        return bool(self._live or self._slots)

    @property
    def has_work(self) -> bool:
        """It has requests, or pages that are on their way to another tier."""
        return self.has_requests or bool(self._lower and self._lower.has_work)

    @property
    def live_ids(self) -> list[int]:
        """The requests whose last delta was not handed over yet."""
        return list(self._live)

    def schedule(self) -> Batch | None:
        """Decide the next step. None: nothing can run before a request is added or a batch comes back."""
        self._expire()
        batch = self._planner.plan_step()
        admitted = [self._slots.at(a.slot).id for a in batch.admitted] if batch and self._deadlines else []
        self.begun = [request_id for request_id in admitted if self._deadlines.may_be_late_to_begin(request_id)]
        return batch

    def retire(self, sampled: Sampled | None) -> list[Delta]:
        """Take what the oldest batch in flight sampled, or None if none has come back. Returns each request's news.

        Tokens of a request that has ended in the meantime are dropped: at most one after an EOS or a stop id.
        """
        deltas, self._pending_deltas = self._pending_deltas, []
        for delta in deltas:
            self._forget(delta.request_id, delta.index)
        if sampled is not None:
            deltas += self._collect(sampled)
            self._planner.free_returned()
        return deltas

    @property
    def load(self) -> tuple[int, int, int]:
        """Requests that run and that wait, and the pages that requests hold: as in `stats`, for every step."""
        return len(self._slots), len(self._waiting), self._pool.used

    @property
    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            waiting_requests=self.waiting,
            running_requests=len(self._slots),
            num_pages=self._pool.num_pages,
            used_pages=self._pool.used,
            cached_pages=self._pool.cached,
            steps=self._in_flight.last_launched,
            finished_requests=self._finished,
            preemptions=self._planner.preemptions,
            overshoot_tokens=self._overshoot_tokens,
            prefix_query_tokens=self._planner.prefix_query_tokens,
            prefix_hit_tokens=self._planner.prefix_hit_tokens,
            tiers=self._lower.stats if self._lower else None,
        )

    def check(self) -> None:
        """Raise AssertionError if a request, a slot or a page is lost or in two places, or a clock is wrong."""
        self._planner.check()
        held = [s for sequences in self._live.values() for s in sequences if s.state is State.HELD]
        self._waiting.check(len(held))
        for s in held:
            leader = self._live[s.id][0]
            assert leader.state is State.HELD or s in leader.siblings, f"nothing will release request {s.id}"
        placed = [s for s in chain(self._waiting, self._slots, held) if s.finish_reason is None]
        ids = Counter(s.id for s in placed) + Counter(delta.request_id for delta in self._pending_deltas)
        live = Counter({id: len(sequences) for id, sequences in self._live.items()})
        assert ids == live, f"requests are lost or in two places: {ids} and {live}"

    def _expire(self) -> None:
        if not self._deadlines:
            return
        for _, request_id, reason in self._deadlines.take_due(self._clock()):
            if reason is FinishReason.DEADLINE or not self._live[request_id][0].has_begun:
                self.cancel(request_id, reason)

    def _collect(self, sampled: Sampled) -> list[Delta]:
        """A delta for each token that a step sampled. Most of a step's thousand tokens take the fast path."""
        sequences = self._in_flight.returned(sampled)
        self.observer.returned(sampled.step)
        if sampled.transfers is not None:
            self._account.returned(sampled.transfers)
        for scores in sampled.prompt_scores:
            known = self._slots.at(scores.slot).prompt_logprobs
            if known is not None:  # after a preemption they come again
                known[scores.position - 1 :] = scores.tokens
        deltas: list[Delta] = []
        for s, token in zip(sequences, sampled.token_ids, strict=True):
            if s.fast_path and token not in s.stop_ids:
                s.tokens.append(token)
                deltas.append(Delta(s.id, (token,)))
            elif s.finish_reason is None:
                s.tokens.append(token)
                deltas.append(self._deliver(s, token, sampled.logprobs.get(s.slot)))
        self._overshoot_tokens += len(sequences) - len(deltas)
        self.observer.delivered(len(deltas))
        return deltas

    def _deliver(self, s: Sequence, token: int, logprobs: TokenLogprobs | None) -> Delta:
        """All that a sequence's newest token brings."""
        delta = Delta(s.id, (token,), None if logprobs is None else [logprobs], index=s.index)
        if s.output_tokens == 1:
            delta.cached_tokens = s.cached_tokens
            delta.prompt_logprobs, s.prompt_logprobs = s.prompt_logprobs, None
        if token in s.stop_ids and s.output_tokens >= s.params.min_tokens:
            delta.finish_reason = FinishReason.STOP
            if s.params.ignore_eos or token not in self._eos_token_ids:
                delta.stop_reason = token
        elif len(s.tokens) >= s.max_total_tokens:
            delta.finish_reason = FinishReason.LENGTH
        if delta.finish_reason is not None:
            self._forget(s.id, s.index)
            delta.account = self._finish(s, delta.finish_reason)
        else:
            s.fast_path = s.index == 0 and s.params.logprobs is None and s.state is not State.RETIRING
        return delta

    def _forget(self, request_id: int, index: int) -> None:
        """The last delta of a sequence is handed over."""
        self._live[request_id] = [s for s in self._live[request_id] if s.index != index]
        if not self._live[request_id]:
            del self._live[request_id]
            self._deadlines.forget(request_id)

    def _finish(self, s: Sequence, reason: FinishReason) -> Account:
        account = self.observer.ended(s, reason)
        s.finish_reason, s.fast_path = reason, False
        self._finished += 1
        if s.output_tokens:  # cancelled ones count: that is how a stop string ends a request
            self._forecast.record(s.output_tokens)
        if s.state in (State.WAITING, State.HELD):
            self._waiting.remove(s)
            s.state = State.ENDED
        elif s.state is not State.RETIRING:
            self._planner.retire(s)
        self._waiting.release(s.siblings)  # there will be no prompt to share
        return account
