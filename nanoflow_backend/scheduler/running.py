"""Running: the sequences with a slot and pages. Each step moves them on; who waits is let in where there is room."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from nanoflow_backend.scheduler.batch import Admission, Batch, Prefill
from nanoflow_backend.scheduler.flight import Flight
from nanoflow_backend.scheduler.forecast import Forecast
from nanoflow_backend.scheduler.observer import Observer
from nanoflow_backend.scheduler.outlook import Outlook
from nanoflow_backend.scheduler.page_account import PageAccount
from nanoflow_backend.scheduler.sequence import Sequence, State, rank
from nanoflow_backend.scheduler.slots import Slots
from nanoflow_backend.scheduler.waiting_queue import WaitingQueue


class Running:
    """Admit, chunk, grow, preempt.

    Attributes:
        backlog: the last step left sequences waiting.
    """

    def __init__(
        self,
        waiting: WaitingQueue,
        slots: Slots,
        account: PageAccount,
        flight: Flight,
        observer: Observer,
        forecast: Forecast,
        *,
        dense_batch_tokens: int,
        chunk_tokens: int,
        prompt_tokens: int,
    ) -> None:
        self._waiting = waiting
        self._slots = slots
        self._account = account
        self._pool = account.pool
        self._flight = flight
        self._observer = observer
        self._forecast = forecast
        self._dense_batch_tokens = dense_batch_tokens
        self._chunk_tokens = chunk_tokens
        self._prompt_tokens = prompt_tokens
        self._filled: list[Sequence] = []  # had a prefill chunk in the last step
        self.backlog = False
        self.preemptions = 0
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0

    def form(self) -> Batch | None:
        """The next step, which is on its way from now on. None: nothing can run."""
        self._publish_filled()
        step = self._flight.formed + 1
        page_table: list[tuple[int, int, int]] = []
        sampled = self._grow(page_table)
        slots = [s.slot for s in sampled]
        positions = [s.computed for s in sampled]
        for s in sampled:
            s.last_step = step
            s.computed = computed = s.computed + 1
            if computed + 1 >= s.max_total_tokens:
                self._complete(s)

        prefills: list[Prefill] = []
        admitted: list[Admission] = []
        left = budget = min(self._dense_batch_tokens - len(sampled), self._prompt_tokens)
        prompts = chain(list(self._slots.prefilling.values()), self._admit(page_table, admitted))
        while left > 0 and (sequence := next(prompts, None)) is not None:
            prefill = self._prefill(sequence, step, left)
            prefills.append(prefill)
            left -= len(prefill.token_ids)
            if prefill.sample:
                sampled.append(sequence)
        self.backlog = self._waiting.head is not None
        if not slots and not prefills:
            return None
        self._observer.formed(len(slots) + budget - left, sampled, len(slots))
        self._flight.take_off(sampled)
        return Batch(step, slots, positions, prefills, page_table, admitted)

    def leave(self, s: Sequence) -> None:
        """No further step for this sequence; its pages go when nothing in flight writes them."""
        self._slots.start_leaving(s)
        if s.last_step <= self._flight.returned:
            self._release(s)

    def release(self) -> None:
        """Let those go whose last step has come back."""
        for s in [s for s in self._slots.leaving.values() if s.last_step <= self._flight.returned]:
            self._release(s)

    def check(self) -> None:
        """Raise AssertionError if a slot or a page is lost or in two places, or a clock is wrong."""
        self._slots.check()
        self._account.check(self._slots)
        in_flight = self._flight.samples()
        for s in self._slots:
            name = f"request {s.id}"
            assert s.last_step <= self._flight.formed, f"{name} is in a step that was not formed"
            gone = s.state is State.LEAVING and s.last_step <= self._flight.returned
            assert not gone, f"{name} has left and holds pages"
            left = s.max_total_tokens - len(s.tokens) - in_flight[s.arrival]
            assert left >= 0, f"{name} runs beyond its length"
            more_to_tell = s.finish_reason or s.index or s.params.logprobs is not None or not left
            assert not (s.plain and more_to_tell), f"{name} has more to tell than a token"
            if s.state is State.DECODING:
                assert s.computed + 1 == len(s.tokens) + in_flight[s.arrival], f"{name}: its clocks disagree"
            if s.state is State.PREFILLING:
                assert s.computed < len(s.tokens), f"{name}: nothing is left to prefill"
                assert not in_flight[s.arrival], f"{name} is sampled before its prompt ends"

    def _publish_filled(self) -> None:
        """What the last step prefilled may be shared from now on."""
        for s in self._filled:
            self._account.publish(s)
            if s.siblings and s.computed >= s.prompt_tokens:
                self._waiting.release(s.siblings)
        self._filled = []

    def _grow(self, page_table: list[tuple[int, int, int]]) -> list[Sequence]:
        """Give every decode a page for its next token, at the cost of the highest ranks. Returns those that can run.

        Pages of a request that is still in a step in flight come one step later; who needs them waits for that step.
        """
        needy = {s.slot: s for s in self._slots.decoding.values() if s.computed == s.room}
        while len(needy) > self._pool.available + self._account.freed_by(self._slots.leaving.values()):
            victim = max(self._slots.running, key=rank)
            needy.pop(victim.slot, None)
            victim.preemptions += 1
            self._observer.paused(victim, self._flight.returned)
            self.preemptions += 1
            self.leave(victim)
        for s in sorted(needy.values(), key=rank)[: self._pool.available]:
            page_table.append((s.slot, len(s.pages), self._account.grow(s)))
            self._observer.resumed(s)
            del needy[s.slot]
        for s in needy.values():
            self._observer.paused(s, self._flight.returned)
        decoding = self._slots.decoding.values()
        return [s for s in decoding if s.slot not in needy] if needy else list(decoding)

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
                self._observer.admitted(s)
                self.prefix_query_tokens += s.prompt_tokens
                self.prefix_hit_tokens += s.computed
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
        ends = s.computed == len(s.tokens)
        self._observer.prefilled(s, s.computed - start, ends)
        if ends:
            self._slots.start_decoding(s)
            if s.computed + 1 >= s.max_total_tokens:
                self._complete(s)
        return Prefill(s.slot, start, s.tokens[start : s.computed].tolist(), ends)

    def _complete(self, s: Sequence) -> None:
        """Its last token is on its way."""
        s.plain = False
        self._observer.finishing(s)
        self.leave(s)

    def _release(self, s: Sequence) -> None:
        """Take back slot and pages. A sequence that has not ended was preempted, and goes on later."""
        self._slots.leave(s)
        self._account.close(s)
        if s.finish_reason is None:
            self._waiting.push(s)
        else:
            s.state = State.ENDED
