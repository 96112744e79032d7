"""Scheduler: admit, chunk, grow, retire. One call of `schedule` decides one step; it holds ints and no tensors."""

from __future__ import annotations

import heapq
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

from nanoflow_backend.scheduler.account import Account
from nanoflow_backend.scheduler.batch import Admission, Batch, Delta, FinishReason, Prefill, Sampled
from nanoflow_backend.scheduler.forecast import Forecast, LengthForecast
from nanoflow_backend.scheduler.intake import Intake
from nanoflow_backend.scheduler.observer import Observer
from nanoflow_backend.scheduler.outlook import Outlook
from nanoflow_backend.scheduler.page_account import PageAccount
from nanoflow_backend.scheduler.request import Request
from nanoflow_backend.scheduler.sampling_params import InvalidRequest
from nanoflow_backend.scheduler.sequence import Sequence, State, rank
from nanoflow_backend.scheduler.slots import Slots
from nanoflow_backend.scheduler.stats import SchedulerStats
from nanoflow_backend.scheduler.waiting_queue import QueueFull, WaitingQueue


class Scheduler:
    """Continuous batching over a paged cache (paper, section 4.2).

    The engine calls `schedule`, launches the batch, and calls `retire` with the results of the batch before it, or
    of the same one: then nothing is in flight while a batch is formed. Every batch must come back, in order.

    A step takes one token of every decoding request, then prefill chunks, at most `chunk_tokens` of one request,
    until it has `dense_batch_tokens`. A request takes the pages of its whole prompt when it is admitted, so only
    decodes ever wait for a page. When they do, the request of the highest rank (see Intake) is preempted:
    it gives its pages back and computes later again what it knows. The lowest rank is never stopped, so all end.
    """

    def __init__(
        self,
        *,
        dense_batch_tokens: int,
        chunk_tokens: int,
        max_running: int,
        max_queue_size: int,
        num_pages: int,
        page_tokens: int,
        max_model_tokens: int,
        eos_token_ids: Iterable[int],
        prefix_caching: bool = True,
        priority_aging_s: float = 60.0,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
        forecast: Forecast | None = None,
    ) -> None:
        for name, value in (
            ("chunk_tokens", chunk_tokens),
            ("max_running", max_running),
            ("max_queue_size", max_queue_size),
            ("num_pages", num_pages),
            ("page_tokens", page_tokens),
        ):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if max_model_tokens < 2:
            raise ValueError(f"max_model_tokens: expected a prompt token and another, got {max_model_tokens}")
        if dense_batch_tokens < max_running:
            raise ValueError(
                f"dense_batch_tokens: expected at least max_running ({max_running}), got {dense_batch_tokens}"
            )
        self._dense_batch_tokens = dense_batch_tokens
        self._chunk_tokens = chunk_tokens
        self._max_queue_size = max_queue_size
        self._eos_token_ids = frozenset(eos_token_ids)
        self._intake = Intake(max_model_tokens, num_pages * page_tokens, self._eos_token_ids, seed, priority_aging_s)
        self._clock = clock
        self._forecast = forecast or LengthForecast()
        self._account = PageAccount(num_pages, page_tokens, prefix_caching)
        self._pool = self._account.pool
        self.observer = Observer(clock, dense_batch_tokens)

        self._live: dict[int, list[Sequence]] = {}  # by request id; each until its last delta is handed over
        self._deadlines: list[tuple[float, int]] = []  # a heap of (deadline, request id); an ended one stays until due
        self._waiting = WaitingQueue()
        self._held = 0  # sequences that wait, and may not be admitted yet
        self._backlog = False  # the last step left requests waiting
        self._slots = Slots(max_running)
        self._filled: list[Sequence] = []  # had a prefill chunk in the last step
        self._in_flight: deque[tuple[int, list[Sequence]]] = deque()  # steps, with the sequences that they sample
        self._news: list[Delta] = []  # last deltas of requests that ended between steps

        self._step = 0
        self._returned_step = 0
        self._finished = 0
        self._preemptions = 0
        self._overshoot_tokens = 0
        self._prefix_query_tokens = 0
        self._prefix_hit_tokens = 0

    def add(self, request: Request, held: bool = False) -> None:
        """Queue a request; one that is `held` is admitted after `release` only.

        Its first sequence goes first: when that one's prompt is in the pages, the others share it.

        Raises:
            InvalidRequest: it could never run; the message names the field and what was expected.
            QueueFull: too many are waiting.
        """
        if request.id in self._live:
            raise InvalidRequest(f"id: expected one that is not in use, got {request.id}")
        params = request.params
        if params.n > self._max_queue_size:
            raise InvalidRequest(f"n: expected at most {self._max_queue_size} (max_queue_size), got {params.n}")
        arrived_s = self._clock() if request.arrived_s is None else request.arrived_s
        sequences = self._intake.accept(request, arrived_s)
        if self.queue_room < len(sequences):
            raise QueueFull(self.waiting)
        for s in sequences:
            self.observer.arrived(s, arrived_s)
        self._live[request.id] = sequences
        self._held += len(sequences)
        if not held:
            self._queue(sequences[:1])
        for deadline in (request.deadline, request.queue_deadline):
            if deadline is not None:
                heapq.heappush(self._deadlines, (deadline, request.id))

    def release(self, request_id: int) -> None:
        """A held request may be admitted. An id that is unknown or has ended is left alone."""
        self._queue(self._live.get(request_id, [])[:1])

    def cancel(self, request_id: int, reason: FinishReason = FinishReason.CANCELLED, index: int | None = None) -> None:
        """End a request, or one of its sequences; `retire` hands over the last delta of each.

        What is unknown or has ended is left alone.
        """
        self._end_early(request_id, reason, index)

    def id_at(self, slot: int) -> int:
        """The request in a slot. Raises: KeyError, there is none."""
        return self._slots.at(slot).id

    @property
    def waiting(self) -> int:
        """Sequences in the queue, held ones too."""
        return len(self._waiting) + self._held

    @property
    def queue_room(self) -> int:
        """Sequences that may still come: what the queue has room for and, unless some have to wait, free slots."""
        spare = 0 if self._backlog else len(self._slots.free)
        return max(0, self._max_queue_size + spare - self.waiting)

    @property
    def has_work(self) -> bool:
        """Some request has not ended, or its last delta was not handed over, or its pages are not free yet."""
        return bool(self._live or self._slots)

    @property
    def live_ids(self) -> list[int]:
        """The requests whose last delta was not handed over yet."""
        return list(self._live)

    def schedule(self) -> Batch | None:
        """Decide the next step. None: nothing can run before a request is added or a batch comes back."""
        self._expire()
        for s in self._filled:
            self._account.publish(s)
            if s.siblings and s.computed >= s.prompt_tokens:
                self._queue(s.siblings)
        self._filled = []

        step = self._step + 1
        page_table: list[tuple[int, int, int]] = []
        sampled = self._grow(page_table)
        slots = [s.slot for s in sampled]
        positions = [s.computed for s in sampled]
        for s in sampled:
            s.last_step = step
            s.computed = computed = s.computed + 1
            if computed + 1 >= s.max_total_tokens:
                self.observer.finishing(s)
                self._leave(s)  # its last token is on its way

        prefills: list[Prefill] = []
        admitted: list[Admission] = []
        budget = self._dense_batch_tokens - len(sampled)
        prompts = chain(list(self._slots.prefilling.values()), self._admit(page_table, admitted))
        while budget > 0 and (sequence := next(prompts, None)) is not None:
            prefill = self._prefill(sequence, step, budget)
            prefills.append(prefill)
            budget -= len(prefill.token_ids)
            if prefill.sample:
                sampled.append(sequence)
        self._backlog = len(self._waiting) > 0
        if not slots and not prefills:
            return None
        self._step = step
        self.observer.formed(self._dense_batch_tokens - budget, sampled, len(slots))
        self._in_flight.append((step, sampled))
        return Batch(step, slots, positions, prefills, page_table, admitted)

    def retire(self, sampled: Sampled | None) -> list[Delta]:
        """Take what the oldest batch in flight sampled, or None if none has come back. Returns each request's news.

        Tokens of a request that has ended in the meantime are dropped: at most one after an EOS or a stop id.
        """
        deltas, self._news = self._news, []
        for delta in deltas:
            self._forget(delta.request_id, delta.index)
        if sampled is None:
            return deltas
        scored = self._take_prompt_scores(sampled)
        overshoot_tokens = self._overshoot_tokens
        sequences = self._returning(sampled)
        self.observer.returned(sampled.step)
        logprobs = sampled.logprobs
        for index, (s, token) in enumerate(zip(sequences, sampled.token_ids, strict=True)):
            if s.finish_reason is not None:
                self._overshoot_tokens += 1
                continue
            s.tokens.append(token)
            delta = Delta(s.id, [token])
            if s.cached_tokens or s.index:  # seldom: a thousand deltas a step are made faster without
                delta.cached_tokens, delta.index = s.cached_tokens, s.index
            if logprobs and index in logprobs:
                delta.logprobs = [logprobs[index]]
            if token in s.stop_ids and s.output_tokens >= s.params.min_tokens:
                delta.finish_reason = FinishReason.STOP
                if s.params.ignore_eos or token not in self._eos_token_ids:
                    delta.stop_reason = token
            elif len(s.tokens) >= s.max_total_tokens:
                delta.finish_reason = FinishReason.LENGTH
            deltas.append(delta)
            if delta.finish_reason is not None:
                self._forget(s.id, s.index)
                delta.account = self._finish(s, delta.finish_reason)
        self.observer.delivered(len(sequences) - (self._overshoot_tokens - overshoot_tokens))
        if scored:
            for delta in deltas:
                whose = scored.get((delta.request_id, delta.index))
                if whose is not None and delta.token_ids and whose.output_tokens == 1:
                    delta.prompt_logprobs, whose.prompt_logprobs = whose.prompt_logprobs, []
        for s in [s for s in self._slots.leaving.values() if s.last_step <= self._returned_step]:
            self._release(s)
        return deltas

    @property
    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            waiting_requests=self.waiting,
            running_requests=len(self._slots),
            num_pages=self._pool.num_pages,
            used_pages=self._pool.used,
            cached_pages=self._pool.cached,
            steps=self._step,
            finished_requests=self._finished,
            preemptions=self._preemptions,
            overshoot_tokens=self._overshoot_tokens,
            prefix_query_tokens=self._prefix_query_tokens,
            prefix_hit_tokens=self._prefix_hit_tokens,
        )

    def check(self) -> None:
        """Raise AssertionError if a request, a slot or a page is lost or in two places, or a clock is wrong."""
        self._waiting.check()
        self._slots.check()
        self._account.check(self._slots)
        held = [s for sequences in self._live.values() for s in sequences if s.state is State.HELD]
        assert len(held) == self._held, f"{self._held} sequences are said to be held, {len(held)} are"
        for s in held:
            leader = self._live[s.id][0]
            assert leader.state is State.HELD or s in leader.siblings, f"nothing will queue request {s.id}"
        placed = [s for s in chain(self._waiting, self._slots, held) if s.finish_reason is None]
        ids = Counter(s.id for s in placed) + Counter(delta.request_id for delta in self._news)
        live = Counter({id: len(sequences) for id, sequences in self._live.items()})
        assert ids == live, f"requests are lost or in two places: {ids} and {live}"
        assert all(s.state is State.WAITING and s.finish_reason is None for s in self._waiting), "the ended do not wait"
        in_flight = Counter(s.arrival for _, sampled in self._in_flight for s in sampled)
        for s in self._slots:
            name = f"request {s.id}"
            assert s.last_step <= self._step, f"{name} is in a step that was not formed"
            assert s.state is not State.LEAVING or s.last_step > self._returned_step, f"{name} has left and holds pages"
            assert len(s.tokens) + in_flight[s.arrival] <= s.max_total_tokens, f"{name} runs beyond its length"
            if s.state is State.DECODING:
                assert s.computed + 1 == len(s.tokens) + in_flight[s.arrival], f"{name}: its clocks disagree"
            if s.state is State.PREFILLING:
                assert s.computed < len(s.tokens), f"{name}: nothing is left to prefill"
                assert not in_flight[s.arrival], f"{name} is sampled before its prompt ends"

    def _expire(self) -> None:
        now = self._clock() if self._deadlines else 0.0
        while self._deadlines and self._deadlines[0][0] <= now:
            due, request_id = heapq.heappop(self._deadlines)
            sequences = self._live.get(request_id)
            if sequences is None:
                continue
            if sequences[0].deadline == due:  # not so where the id is in its second life
                self._end_early(request_id, FinishReason.DEADLINE)
            elif sequences[0].queue_deadline == due and not sequences[0].has_begun:
                self._end_early(request_id, FinishReason.QUEUE_TIMEOUT)

    def _grow(self, page_table: list[tuple[int, int, int]]) -> list[Sequence]:
        """Give every decode a page for its next token, at the cost of the highest ranks. Returns those that can run.

        Pages of a request that is still in a step in flight come one step later; who needs them waits for that step.
        """
        needy = {s.slot: s for s in self._slots.decoding.values() if s.computed == s.room}
        if not needy:
            return list(self._slots.decoding.values())
        while len(needy) > self._pool.available + self._account.freed_by(self._slots.leaving.values()):
            victim = max(self._slots.running, key=rank)
            needy.pop(victim.slot, None)
            victim.preemptions += 1
            self.observer.paused(victim, self._returned_step)
            self._preemptions += 1
            self._leave(victim)
        for s in sorted(needy.values(), key=rank)[: self._pool.available]:
            page_table.append((s.slot, len(s.pages), self._account.grow(s)))
            self.observer.resumed(s)
            del needy[s.slot]
        for s in needy.values():
            self.observer.paused(s, self._returned_step)
        return [s for s in self._slots.decoding.values() if s.slot not in needy]

    def _admit(self, page_table: list[tuple[int, int, int]], admitted: list[Admission]) -> Iterator[Sequence]:
        """Let waiting requests in, in order, while the predicted peak of page use fits; one always may run."""
        outlook = None
        while self._slots.free and (s := self._waiting.head) is not None:
            known = self._account.known_prefix(s)
            cost_pages = self._account.cost(s, known)
            if cost_pages > self._pool.available:
                return
            if self._slots.prefilling or self._slots.decoding:
                outlook = outlook or Outlook(self._slots, self._account, self._forecast)
                if outlook.add(s, cost_pages) > self._pool.num_pages:
                    return
            self._waiting.remove(s)
            self._account.open(s, known)
            self._slots.enter(s)
            if not s.preemptions:
                s.cached_tokens = s.computed
                self.observer.admitted(s)
                self._prefix_query_tokens += s.prompt_tokens
                self._prefix_hit_tokens += s.computed
            page_table.extend((s.slot, index, page) for index, page in enumerate(s.pages))
            known_tokens = s.tokens.tolist() if s.params.reads_tokens else []
            admitted.append(Admission(s.slot, s.prompt_tokens, s.params, known_tokens))
            yield s

    def _prefill(self, s: Sequence, step: int, budget: int) -> Prefill:
        """The next chunk of what the sequence knows and has not computed."""
        start = s.computed
        s.computed = min(start + self._chunk_tokens, start + budget, len(s.tokens))
        s.last_step = step
        self._filled.append(s)
        complete = s.computed == len(s.tokens)
        self.observer.prefilled(s, s.computed - start, complete)
        if complete:
            self._slots.start_decoding(s)
            if s.computed + 1 >= s.max_total_tokens:
                self.observer.finishing(s)
                self._leave(s)
        return Prefill(s.slot, start, s.tokens[start : s.computed].tolist(), complete)

    def _returning(self, sampled: Sampled) -> list[Sequence]:
        """The sequences of the oldest step in flight, which has come back."""
        if not self._in_flight:
            raise ValueError(f"step {sampled.step} came back, and none is in flight")
        step, sequences = self._in_flight[0]
        if (sampled.step, len(sampled.token_ids)) != (step, len(sequences)):
            raise ValueError(
                f"expected {len(sequences)} tokens of step {step}, got {len(sampled.token_ids)} of step {sampled.step}"
            )
        self._in_flight.popleft()
        self._returned_step = step
        return sequences

    def _queue(self, sequences: Iterable[Sequence]) -> None:
        """Those of them that are held may be admitted from now on."""
        for s in sequences:
            if s.state is State.HELD:
                self._held -= 1
                s.state = State.WAITING
                self._waiting.push(s)

    def _forget(self, request_id: int, index: int) -> None:
        """The last delta of a sequence is handed over."""
        self._live[request_id] = [s for s in self._live[request_id] if s.index != index]
        if not self._live[request_id]:
            del self._live[request_id]

    def _take_prompt_scores(self, sampled: Sampled) -> dict[tuple[int, int], Sequence]:
        """The sequences that a step brought scores of their prompts, by request and index."""
        scored = {}
        for scores in sampled.prompt_scores:
            s = self._slots.at(scores.slot)
            s.prompt_logprobs[scores.position - 1 :] = scores.tokens  # after a preemption they come again
            scored[s.id, s.index] = s
        return scored

    def _end_early(self, request_id: int, reason: FinishReason, index: int | None = None) -> None:
        for s in self._live.get(request_id, ()):
            if s.finish_reason is None and index in (None, s.index):
                account = self._finish(s, reason)
                self._news.append(Delta(request_id, [], None, reason, None, s.cached_tokens, s.index, account=account))

    def _finish(self, s: Sequence, reason: FinishReason) -> Account:
        account = self.observer.ended(s, reason)
        s.finish_reason = reason
        self._finished += 1
        if s.output_tokens:  # cancelled ones count: that is how a stop string ends a request
            self._forecast.record(s.output_tokens)
        if s.state is State.WAITING:
            self._waiting.remove(s)
            s.state = State.ENDED
        elif s.state is State.HELD:
            self._held -= 1
            s.state = State.ENDED
        elif s.state is not State.LEAVING:
            self._leave(s)
        self._queue(s.siblings)  # there will be no prompt to share
        return account

    def _leave(self, s: Sequence) -> None:
        """No further step for this sequence; its pages go when nothing in flight writes them."""
        self._slots.start_leaving(s)
        if s.last_step <= self._returned_step:
            self._release(s)

    def _release(self, s: Sequence) -> None:
        """Take back slot and pages. A sequence that has not ended was preempted, and goes on later."""
        self._slots.leave(s)
        self._account.close(s)
        if s.finish_reason is None:
            s.state = State.WAITING
            self._waiting.push(s)
        else:
            s.state = State.ENDED
