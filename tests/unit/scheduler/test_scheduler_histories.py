"""Random histories of the scheduler, against an executor that notices wrong pages and wrong tokens.

The long run: `make histories HISTORIES=20000`. Without it: a thousand, and the fewest with tiers that see every event.
"""

from __future__ import annotations

import os
import random
from collections import Counter, deque
from dataclasses import dataclass, field

import pytest
from support.scheduler import draws
from support.scheduler.gateway import Gateway
from support.scheduler.ledger_executor import EOS, LedgerExecutor, LedgerStep, Story

from nanoflow_backend.bench.reservation import ReserveMaxTokens, ReserveNothing
from nanoflow_backend.kvcache.tier import Move
from nanoflow_backend.request.request import Request
from nanoflow_backend.request.sampling_params import InvalidRequest
from nanoflow_backend.scheduler.batch import Batch, Delta, FinishReason
from nanoflow_backend.scheduler.forecast.length_forecast import LengthForecast
from nanoflow_backend.scheduler.scheduler import Scheduler
from nanoflow_backend.scheduler.tiers.lower_tiers import LowerTiers
from nanoflow_backend.scheduler.waiting_queue import QueueFull

CHUNK = 1_000
HISTORIES = int(os.environ.get("HISTORIES", CHUNK))  # and a sixth as many, four times as long, with tiers below
INTERRUPTIONS = (FinishReason.CANCELLED, FinishReason.DEADLINE, FinishReason.REFUSED)


@dataclass
class Life:
    """What became of one sequence of a request."""

    request: Request
    story: Story
    most_tokens: int  # prompt and output
    output: list[int] = field(default_factory=list)
    ends: list[FinishReason] = field(default_factory=list)
    stop_reason: int | None = None
    cached_tokens: int = 0
    scored: list[int] | None = None  # the prompt's tokens that came with log-probabilities


class History:
    """A random scheduler, random requests, and every rule that can be checked from outside.

    With `tiers`, there are host memory and perhaps a disk below the device.
    """

    def __init__(self, seed: int, tiers: bool = False) -> None:
        rng = self.rng = random.Random(seed)
        self.now = 0.0
        self.asynchronous = rng.random() < 0.7
        limits = self.limits = draws.limits(rng)
        self.gateway = Gateway(limits.page_tokens)
        below = draws.Tiers()
        if tiers:
            below = draws.tiers(random.Random(seed), limits.page_tokens, self.gateway.events, lambda: self.now)
        self.lower = below.lower
        self.scheduler = Scheduler(
            limits,
            eos_token_ids=[EOS],
            prefix_caching=rng.random() < 0.8,
            priority_aging_s=rng.choice((0, 3, 1000)),
            clock=lambda: self.now,
            forecast=rng.choice((LengthForecast, ReserveNothing, ReserveNothing, ReserveMaxTokens))(),
            page_events=self.gateway.events,
            lower=self.lower,
        )
        self.executor = LedgerExecutor(
            limits.num_pages, limits.page_tokens, below.host_slots, below.disk, random.Random(seed) if tiers else None
        )
        self.in_flight: deque[LedgerStep] = deque()
        self.lives: dict[tuple[int, int], Life] = {}  # by request and sequence
        self.requests: list[int] = []
        self.held: list[int] = []
        self.seen: Counter[str] = Counter()
        self.interrupted = 0

    def run(self) -> Counter[str]:
        for _ in range(self.rng.randint(20, 160) if self.lower else self.rng.randint(5, 40)):
            action = self.rng.random()
            if action < 0.4:
                self.add()
            elif action < 0.45 and self.lives:
                self.scheduler.cancel(self.rng.choice([*self.requests, -1]), index=self.rng.choice((None, 0, 1)))
                self.check()
            elif action < 0.47 and self.lives:
                self.refuse(self.rng.choice([*self.requests, -1]))
            elif action < 0.52 and self.held:
                self.scheduler.release(self.held.pop())
                self.check()
            else:
                self.step()
        for request_id in self.held:
            self.scheduler.release(request_id)
        idle_steps = 0
        while (
            self.scheduler.has_work or self.in_flight
        ):  # no deadlock, and no livelock: two steps without any work end no history
            idle_steps = 0 if self.step() else idle_steps + 1
            assert idle_steps <= 2, "there is work, and nothing runs"
        self.verify()
        return self.seen

    def add(self) -> None:
        """One request, or some together."""
        first, count = len(self.requests), self.rng.choice((1, 1, 1, 2, 3))
        known = [life.story.tokens for life in self.lives.values()]
        requests = [draws.request(self.rng, id, known, self.now) for id in range(first, first + count)]
        held = [request.id for request in requests if self.rng.random() < 0.1]
        sequences = sum(request.params.n for request in requests)
        room, waiting = self.scheduler.queue_room, self.scheduler.waiting
        try:
            self.scheduler.add(*requests, held=held)
        except InvalidRequest:
            longest = min(self.limits.max_model_tokens - 1, self.limits.num_pages * self.limits.page_tokens)
            assert any(len(r.prompt) > longest for r in requests) or sequences > self.limits.max_queue_size
            assert self.scheduler.waiting == waiting
            self.seen["invalid"] += 1
        except QueueFull:
            assert sequences > room
            assert self.scheduler.waiting == waiting
            self.seen["queue full"] += 1
        else:
            assert self.scheduler.waiting == waiting + sequences
            self.seen["together"] += count > 1
            self.held += held
            for request in requests:
                self.begin_lives(request)
        self.check()

    def begin_lives(self, request: Request) -> None:
        """The request was taken: tell the executor what each of its sequences will say."""
        prompt, params, limits = request.prompt, request.params, self.limits
        most = min(len(prompt) + params.max_tokens, limits.max_model_tokens, limits.num_pages * limits.page_tokens + 1)
        # a sampler masks them; the scheduler does not rely on it. Two tokens more than anyone can see: overshoot
        masked = self.rng.choice((frozenset({EOS, 1}), frozenset[int]()))
        self.requests.append(request.id)
        for index in range(params.n):
            seed = params.of_sequence(index).seed
            assert seed is not None
            story = Story.of(prompt, seed, params.max_tokens + 2, masked, params.min_tokens)
            self.lives[request.id, index] = Life(request, story, most)
            self.executor.stories[seed] = story
            self.gateway.may_hear_of(story.tokens)

    def step(self) -> bool:
        """The engine's step; False if it did nothing at all."""
        self.now += 1
        batch = self.scheduler.schedule()
        self.check()
        if batch is not None:
            self.check_batch(batch)
            self.in_flight.append(self.executor.launch_forward(batch))
        wait = len(self.in_flight) > (1 if self.asynchronous and batch is not None else 0)
        deltas = self.scheduler.retire(self.executor.collect(self.in_flight.popleft()) if wait else None)
        self.check()
        for delta in deltas:
            self.take(delta)
        return batch is not None or wait or bool(deltas)

    def check(self) -> None:
        """The scheduler's own check; and a gateway knows the pages that can be found, and no others."""
        self.scheduler.check()
        host = [content for content, entry in self.lower.host._entries.items() if entry.whole] if self.lower else []
        self.seen.update(self.gateway.follow(self.scheduler._account._device._index._pages, host))

    def check_batch(self, batch: Batch) -> None:
        slots = batch.decode_slots + [p.slot for p in batch.prefills]
        assert len(set(slots)) == len(slots), "a slot is in a batch twice"
        assert 0 < batch.tokens <= self.limits.dense_batch_tokens or (self.lower and not batch.tokens)
        self.seen["steps of transfers alone"] += not batch.tokens and bool(batch.transfers)
        self.seen["steps that wait for transfers"] += not batch.tokens and not batch.transfers
        if self.lower:
            self.lower.check()
            meeting = {s.slot for s in self.scheduler._slots if s.load}
            self.seen["computed and loaded"] += bool(meeting & {p.slot for p in batch.prefills})
        assert all(0 < len(p.token_ids) <= self.limits.chunk_tokens for p in batch.prefills)
        assert sum(len(p.token_ids) for p in batch.prefills) <= self.limits.prompt_tokens
        self.seen["decodes and prefills together"] += bool(batch.decode_slots and batch.prefills)

    def take(self, delta: Delta) -> None:
        life = self.lives[delta.request_id, delta.index]
        assert not life.ends, f"request {delta.request_id} has news after its end"
        if delta.prompt_logprobs is not None:
            assert life.scored is None, f"request {delta.request_id} is scored twice"
            assert not life.output, f"request {delta.request_id} is scored late"
            life.scored = [scores.token_ids[0] for scores in delta.prompt_logprobs]
        life.cached_tokens = max(life.cached_tokens, delta.cached_tokens)
        life.output += delta.token_ids
        self.seen["prefix hits"] += delta.cached_tokens > 0
        if delta.account is not None:
            loaded_tokens = delta.account.host_tokens + delta.account.disk_tokens
            assert not life.output or loaded_tokens <= life.cached_tokens < len(life.request.prompt)
            self.seen["loaded from host memory"] += delta.account.host_tokens > 0
            self.seen["loaded from disk"] += delta.account.disk_tokens > 0
        if delta.finish_reason is not None:
            life.ends.append(delta.finish_reason)
            life.stop_reason = delta.stop_reason
            self.seen[delta.finish_reason] += 1

    def verify(self) -> None:
        stats = self.scheduler.stats
        assert (stats.used_pages, stats.running_requests, stats.waiting_requests) == (0, 0, 0)
        assert not self.in_flight
        for (request_id, index), life in self.lives.items():
            assert len(life.ends) == 1, f"sequence {index} of request {request_id} ended {len(life.ends)} times"
            self.verify_output(life)
            scores = index == 0 and life.request.params.prompt_logprobs is not None and life.output
            expected = life.request.prompt[1:] if scores else None
            assert life.scored == expected, f"request {request_id} is scored wrongly"
            self.seen["scored"] += life.scored is not None
            self.seen["siblings"] += index
        stopped = self.seen[FinishReason.STOP]
        interrupted = sum(self.seen[reason] for reason in INTERRUPTIONS)
        # a cancelled request may lose the token in flight
        assert stats.overshoot_tokens <= (stopped + interrupted if self.asynchronous else 0)
        assert stats.finished_requests == len(self.lives)
        self.seen["preemptions"] += stats.preemptions
        self.seen["overshoot"] += stats.overshoot_tokens
        self.seen["steps"] += stats.steps
        if self.lower:
            self.verify_tiers(self.lower)

    def verify_tiers(self, lower: LowerTiers) -> None:
        assert not lower.has_work
        lower.check()
        tiers = lower.stats
        began = Counter(transfer.move.name.lower() for transfer in self.executor.moves)
        assert began == Counter(tiers.moved_pages) + Counter(tiers.failed_pages), "transfers are miscounted"
        self.seen += Counter(tiers.moved_pages)
        self.seen += Counter({f"{move} that failed": pages for move, pages in tiers.failed_pages.items()})
        self.seen["evicted from host memory"] += tiers.evicted_pages
        self.seen["dropped"] += sum(tiers.dropped_pages.values())

    def refuse(self, request_id: int) -> None:
        counted = sum(self.scheduler.observer.observed.ended.values())
        self.scheduler.cancel(request_id, FinishReason.REFUSED)
        assert not self.scheduler.cancel(request_id, FinishReason.REFUSED), "there is nothing left to end"
        assert sum(self.scheduler.observer.observed.ended.values()) == counted
        self.check()

    def verify_output(self, life: Life) -> None:
        params, prompt = life.request.params, life.request.prompt
        stops = set(params.stop_token_ids) | (set() if params.ignore_eos else {EOS})
        truth = life.story.tokens[len(prompt) : life.most_tokens]
        stop_at = next((i for i, t in enumerate(truth) if t in stops and i + 1 >= params.min_tokens), None)
        complete = truth if stop_at is None else truth[: stop_at + 1]
        assert life.output == complete[: len(life.output)], f"request {life.request.id} got other tokens"
        if life.ends == [FinishReason.STOP]:
            assert stop_at is not None
            assert life.output == complete
            assert life.stop_reason == (None if truth[stop_at] == EOS and not params.ignore_eos else truth[stop_at])
        elif life.ends == [FinishReason.LENGTH]:
            assert stop_at is None
            assert life.output == complete
        elif life.ends == [FinishReason.DEADLINE]:
            assert life.request.deadline is not None
        elif life.ends == [FinishReason.QUEUE_TIMEOUT]:
            assert life.request.queue_deadline is not None
            assert not life.output


def run_histories(seeds: range, tiers: bool = False) -> Counter[str]:
    seen: Counter[str] = Counter()
    for seed in seeds:
        try:
            seen += History(seed, tiers).run()
        except BaseException as error:
            error.add_note(f"history seed {seed}")
            raise
    return seen


@pytest.mark.parametrize("first", range(0, HISTORIES, CHUNK))
def test_every_request_ends_once_with_its_own_tokens_and_no_page_is_lost(first: int) -> None:
    seen = run_histories(range(first, first + CHUNK))
    others = ("preemptions", "prefix hits", "overshoot", "queue full", "invalid", "together", "scored", "siblings")
    for event in (*FinishReason, *others, "BlockStored", "BlockRemoved"):
        assert seen[event] >= 20, f"the histories hardly know '{event}': they prove little"


@pytest.mark.parametrize("first", range(0, HISTORIES // 6, CHUNK // 3))
def test_with_tiers_below_no_page_is_lost_and_no_token_is_computed_on_one_that_is_not_loaded(first: int) -> None:
    seen = run_histories(range(first, first + CHUNK // 3), tiers=True)
    moves = (*(move.name.lower() for move in Move), "read that failed", "write that failed", "evicted from host memory")
    loads = ("loaded from host memory", "loaded from disk", "dropped")
    steps = ("steps of transfers alone", "steps that wait for transfers", "computed and loaded")
    for event in (*FinishReason, "preemptions", "prefix hits", *moves, *loads, *steps):
        assert seen[event] >= 5, f"the histories hardly know '{event}': they prove little"
