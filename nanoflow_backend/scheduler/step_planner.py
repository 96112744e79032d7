"""StepPlanner decides what one step computes: decodes first, then prompts, and who is admitted or preempted for it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from nanoflow_backend.scheduler.batch import Admission, Batch, Prefill
from nanoflow_backend.scheduler.forecast.length_forecast import Forecast
from nanoflow_backend.scheduler.forecast.page_forecast import PageForecast
from nanoflow_backend.scheduler.limits import SchedulerLimits
from nanoflow_backend.scheduler.observer import Observer
from nanoflow_backend.scheduler.pace import Pace, StepWork
from nanoflow_backend.scheduler.page_account import PageAccount
from nanoflow_backend.scheduler.sequence import Sequence, State, service_order
from nanoflow_backend.scheduler.slots import Slots
from nanoflow_backend.scheduler.steps_in_flight import StepsInFlight
from nanoflow_backend.scheduler.waiting_queue import WaitingQueue


class StepPlanner:
    """Admit, chunk, grow, preempt (paper, section 4.2).

    Attributes:
        backlog: the last step left sequences waiting.
    """

    def __init__(
        self,
        waiting: WaitingQueue,
        slots: Slots,
        account: PageAccount,
        in_flight: StepsInFlight,
        observer: Observer,
        forecast: Forecast,
        limits: SchedulerLimits,
        pace: Pace | None,
    ) -> None:
        self._waiting = waiting
        self._slots = slots
        self._account = account
        self._pool = account.pool
        self._in_flight = in_flight
        self._observer = observer
        self._forecast = forecast
        self._limits = limits
        self._pace = pace
        self._filled: list[Sequence] = []  # had a prefill chunk in the last step
        self.backlog = False
        self.preemptions = 0
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0

    def plan_step(self) -> Batch | None:
        """The next step, which counts as launched from now on. None: nothing can run."""
        self._publish_filled()
        self._meet_loads()
        returned = self._in_flight.last_returned
        step = self._in_flight.last_launched + 1
        transfers = self._account.begin_stores(returned, self._waiting.head)  # before pages are taken for others
        page_table: list[tuple[int, int, int]] = []
        sampled = self._grow(page_table)
        slots = [s.slot for s in sampled]
        positions = [s.num_computed_tokens for s in sampled]
        for s in sampled:
            s.last_step = step
            s.num_computed_tokens = computed = s.num_computed_tokens + 1
            if computed + 1 >= s.max_total_tokens:
                self._complete(s)

        prefills: list[Prefill] = []
        admitted: list[Admission] = []
        decode_kv_tokens = sum(positions)
        most = self._limits.prompt_tokens
        if self._pace:
            most = self._pace.prompt_tokens(len(sampled), decode_kv_tokens)
        left = budget = min(self._limits.dense_batch_tokens - len(sampled), most)
        prompts = chain(list(self._slots.prefilling.values()), self._admit(step, page_table, admitted))
        while left > 0 and (sequence := next(prompts, None)) is not None:
            prefill = self._prefill(sequence, step, left)
            prefills.append(prefill)
            left -= len(prefill.token_ids)
            if prefill.sample:
                sampled.append(sequence)
        self.backlog = self._waiting.head is not None
        transfers += self._account.begin_loads()
        waits = self._account.transfers_outstanding > 0 and returned == step - 1  # nothing else will come back
        if not (slots or prefills or admitted or transfers or waits):
            return None
        self._observer.formed(StepWork(len(slots), decode_kv_tokens, budget - left), sampled)
        self._in_flight.launched(sampled)
        return Batch(step, slots, positions, prefills, page_table, admitted, transfers, returned)

    def retire(self, s: Sequence) -> None:
        """Plan no further step for this sequence; its pages are freed when no step in flight writes them."""
        self._slots.move(s, State.RETIRING)
        self._account.leave(s)
        if self._has_returned(s):
            self._free(s)

    def free_returned(self) -> None:
        """Free slots and pages of retiring sequences whose last step, and last load, has come back."""
        for s in [s for s in self._slots.retiring.values() if self._has_returned(s)]:
            self._free(s)

    def check(self) -> None:
        """Raise AssertionError if a slot or a page is lost or in two places, or a clock is wrong."""
        self._slots.check()
        self._account.check(self._slots)
        in_flight = self._in_flight.samples()
        for s in self._slots:
            name = f"request {s.id}"
            assert s.last_step <= self._in_flight.last_launched, f"{name} is in a step that was not launched"
            gone = s.state is State.RETIRING and self._has_returned(s)
            assert not gone, f"{name} has left and holds pages"
            left = s.max_total_tokens - len(s.tokens) - in_flight[s.arrival_number]
            assert left >= 0, f"{name} runs beyond its length"
            more_to_tell = s.finish_reason or s.index or s.params.logprobs is not None or not left
            assert not (s.fast_path and more_to_tell), f"{name} has more to tell than a token"
            if s.state is State.DECODING:
                known_tokens = len(s.tokens) + in_flight[s.arrival_number]
                assert s.num_computed_tokens + 1 == known_tokens, f"{name}: its clocks disagree"
            if s.state is State.LOADING:
                assert s.load is not None, f"{name} waits for nothing"
            if s.state in (State.PREFILLING, State.LOADING):
                assert s.num_computed_tokens < len(s.tokens), f"{name}: nothing is left to prefill"
                assert not in_flight[s.arrival_number], f"{name} is sampled before its prompt ends"

    def _publish_filled(self) -> None:
        """Let others share what the last step prefilled, now that it was launched."""
        for s in self._filled:
            self._account.publish(s)
            if s.siblings and s.num_computed_tokens >= s.prompt_tokens:
                self._waiting.release(s.siblings)
        self._filled = []

    def _meet_loads(self) -> None:
        """Sequences go on behind what was loaded, or compute some more of it, or wait."""
        for s in [s for s in chain(self._slots.loading.values(), self._slots.prefilling.values()) if s.load]:
            self._meet_load(s)

    def _meet_load(self, s: Sequence) -> None:
        plan, computed_tokens = s.load, s.num_computed_tokens
        end = self._account.meet(s)
        if plan is not None and s.load is None:
            tokens = s.num_computed_tokens - computed_tokens
            self._observer.loaded(s, tokens, plan.read_pages * self._limits.page_tokens)
            if not s.preemptions:
                s.cached_tokens += tokens
                self.prefix_hit_tokens += tokens
        state = State.PREFILLING if end > s.num_computed_tokens else State.LOADING
        if state is not s.state:
            self._slots.move(s, state)

    def _grow(self, page_table: list[tuple[int, int, int]]) -> list[Sequence]:
        """Give every decode a page for its next token, at the cost of the last in service order; return who can run.

        Pages of a request that is still in a step in flight come one step later; who needs them waits for that step.
        """
        needy = {s.slot: s for s in self._slots.decoding.values() if s.num_computed_tokens == s.capacity_tokens}
        while len(needy) > self._pool.available + self._account.freed_by(self._slots.retiring.values()):
            victim = max(self._slots.running, key=service_order)
            needy.pop(victim.slot, None)
            victim.preemptions += 1
            self._observer.paused(victim, self._in_flight.last_returned)
            self.preemptions += 1
            self._account.swap_out(victim)
            self.retire(victim)
        for s in sorted(needy.values(), key=service_order)[: self._pool.available]:
            page_table.append((s.slot, len(s.pages), self._account.grow(s)))
            self._observer.resumed(s)
            del needy[s.slot]
        for s in needy.values():
            self._observer.paused(s, self._in_flight.last_returned)
        decoding = self._slots.decoding.values()
        return [s for s in decoding if s.slot not in needy] if needy else list(decoding)

    def _admit(
        self, step: int, page_table: list[tuple[int, int, int]], admitted: list[Admission]
    ) -> Iterator[Sequence]:
        """Admit waiting sequences in order while the predicted peak of page use fits; one may always run.

        Yields those that can be computed at once. Others wait in their slots for pages of a lower tier.
        """
        page_forecast = None
        while self._slots.free and (s := self._waiting.head) is not None:
            known = self._account.known_prefix(s)
            cost_pages = self._account.cost(s, known)
            if cost_pages > self._pool.available:
                return
            if any(self._slots.running):
                page_forecast = page_forecast or PageForecast(self._slots, self._account, self._forecast)
                if page_forecast.add(s, cost_pages) > self._pool.num_pages:
                    return
            self._waiting.remove(s)
            self._account.open(s, known)
            self._slots.enter(s)
            s.last_step = step
            if s.load:
                self._observer.loading(s)
                self._meet_load(s)
            if not s.preemptions:
                s.cached_tokens = s.num_computed_tokens
                self._observer.admitted(s)
                self.prefix_query_tokens += s.prompt_tokens
                self.prefix_hit_tokens += s.num_computed_tokens
            page_table.extend((s.slot, index, page) for index, page in enumerate(s.pages))
            known_tokens = s.tokens.tolist() if s.params.reads_tokens else []
            admitted.append(Admission(s.slot, s.prompt_tokens, s.params, known_tokens))
            if s.state is State.PREFILLING:
                yield s

    def _prefill(self, s: Sequence, step: int, budget: int) -> Prefill:
        """The next chunk of what the sequence knows and has not computed."""
        start = s.num_computed_tokens
        s.num_computed_tokens = min(start + self._limits.chunk_tokens, start + budget, self._account.meet(s))
        self._account.computed(s)
        s.last_step = step
        self._filled.append(s)
        ends = s.num_computed_tokens == len(s.tokens)
        self._observer.prefilled(s, s.num_computed_tokens - start, ends)
        if ends:
            self._slots.move(s, State.DECODING)
            if s.num_computed_tokens + 1 >= s.max_total_tokens:
                self._complete(s)
        return Prefill(s.slot, start, s.tokens[start : s.num_computed_tokens].tolist(), ends)

    def _complete(self, s: Sequence) -> None:
        """Its last token is on its way."""
        s.fast_path = False
        self._observer.finishing(s)
        self.retire(s)

    def _has_returned(self, s: Sequence) -> bool:
        """Nothing writes its pages any more."""
        return s.last_step <= self._in_flight.last_returned and not (s.load and s.load.outstanding)

    def _free(self, s: Sequence) -> None:
        """Take back slot and pages. A sequence that has not ended was preempted, and goes on later."""
        self._slots.remove(s)
        self._account.meet(s)  # others may want what was loaded
        self._account.close(s)
        if s.finish_reason is None:
            self._waiting.push(s)
        else:
            s.state = State.ENDED
