"""LedgerExecutor is an Executor whose model is arithmetic and whose KV pages say what was written into them.

The entry of a position is a number made of every token up to there, so a page that was shared wrongly, reused too
early or never written does not hold what its reader expects. Transfers between tiers take as long as they like: what
they read must stay until they are reported, and what they write holds nothing until then. The next token is a function
of that number, so a token that is lost or doubled changes all that follow.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace

from msgspec import structs
from support.scheduler.lossy_disk import LossyDisk

from nanoflow_backend.kvcache.tier import Move, Transfer, TransferReport
from nanoflow_backend.sampling.constraints import Masks
from nanoflow_backend.scheduler.batch import Batch, PromptScores, Sampled, TokenLogprobs

VOCABULARY = 12
EOS = 0


def entry(before: int, token: int) -> int:
    return (before * 1_000_003 + token * 7919 + 12_345) % 2_305_843_009_213_693_951


def next_token(last_entry: int, seed: int) -> int:
    return ((last_entry ^ seed * 2_654_435_761) // 97) % VOCABULARY


@dataclass(frozen=True)
class Story:
    """What a request must turn out to be: prompt, then output as far as anyone may ask."""

    tokens: list[int]
    entries: list[int]

    @classmethod
    def of(cls, prompt: list[int], seed: int, output_tokens: int, forbidden: frozenset[int], min_tokens: int) -> Story:
        """`forbidden` ids are not sampled before `min_tokens` others were."""
        tokens, entries = [], []
        for position in range(len(prompt) + output_tokens):
            token = prompt[position] if position < len(prompt) else next_token(entries[-1], seed)
            while token in forbidden and len(prompt) <= position < len(prompt) + min_tokens:
                token = (token + 1) % VOCABULARY
            tokens.append(token)
            entries.append(entry(entries[-1] if entries else 0, token))
        return cls(tokens, entries)


@dataclass(frozen=True)
class LedgerStep:
    """A step in flight."""

    batch: Batch
    results: Sampled
    writers: dict[int, int]  # by page, the slot that writes it


@dataclass(frozen=True)
class LedgerTransfer:
    """A transfer on its way."""

    transfer: Transfer
    content: list[int]  # what it has read


class LedgerExecutor:
    """Runs batches in order; everything that it knows of a request comes from them, and from its story by its seed.

    Args:
        host_slots: of host memory, which come to be one after the other.
        disk: what is behind that.
        rng: decides when transfers end, and which of the disk's fail. None: all end with the step that begins them.
    """

    def __init__(
        self,
        num_pages: int,
        page_tokens: int,
        host_slots: int = 0,
        disk: LossyDisk | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.num_pages = num_pages
        self.device = SimpleNamespace(kind="cpu", name="arithmetic", sms=None)
        self.stories: dict[int, Story] = {}
        self._page_tokens = page_tokens
        self._pages = [[-1] * page_tokens for _ in range(num_pages)]
        self._tables: dict[int, dict[int, int]] = {}  # by slot
        self._slot_stories: dict[int, Story] = {}
        self._last_sample: dict[int, int] = {}
        self._scored_prompts: dict[int, list[int]] = {}  # by slot
        self._in_flight: deque[LedgerStep] = deque()
        self._host: dict[int, list[int]] = {}  # what the slots of host memory hold
        self._host_slots, self._disk, self._rng = host_slots, disk, rng
        self._grown_slots = 0
        self._transfers: list[LedgerTransfer] = []
        self.moves: list[Transfer] = []  # all that have begun

    def launch_forward(self, batch: Batch) -> LedgerStep:
        for admission in batch.admitted:
            self._slot_stories[admission.slot] = self.stories[admission.params.seed]
            self._tables[admission.slot] = {}
            self._last_sample.pop(admission.slot, None)
            self._scored_prompts.pop(admission.slot, None)
            if admission.params.reads_tokens:
                known = self._slot_stories[admission.slot].tokens[: len(admission.tokens)]
                assert admission.tokens == known, "a request is not what it was"
                self._scored_prompts[admission.slot] = known[: admission.prompt_tokens]
        for slot, index, page in batch.page_table:
            self._tables[slot][index] = page
        rows = [
            (slot, position, [self._last_sample[slot]])
            for slot, position in zip(batch.decode_slots, batch.decode_positions, strict=True)
        ] + [(p.slot, p.start, p.token_ids) for p in batch.prefills]
        for slot, start, _ in rows:  # all reads of a step come before its writes: nothing of this step can be shared
            self._read(slot, start)
        writers: dict[int, int] = {}
        for slot, start, token_ids in rows:
            self._write(slot, start, token_ids, writers)
        for earlier in self._in_flight:
            for page, slot in writers.items():
                other = earlier.writers.get(page, slot)
                assert other == slot, f"page {page} is reused while slot {other} may write it"
        for transfer in batch.transfers:
            self._begin(transfer, batch.returned)
        assert batch.tokens or batch.admitted or self._transfers, "a step waits for nothing"
        moving = {moving.transfer.page for moving in self._transfers}
        assert not writers.keys() & moving, "a page is written while it is copied"
        ends = {slot: start + len(token_ids) for slot, start, token_ids in rows}
        for slot in batch.sampled_slots:
            self._last_sample[slot] = self._slot_stories[slot].tokens[ends[slot]]
        scores = [
            PromptScores(p.slot, p.start + 1, [TokenLogprobs([token], [-1.0], 1) for token in prompt[p.start + 1 :]])
            for p in batch.prefills
            if p.start < len(prompt := self._scored_prompts.get(p.slot, [])[: p.start + len(p.token_ids) + 1])
        ]
        results = Sampled(batch.step, [self._last_sample[slot] for slot in batch.sampled_slots], {}, scores)
        self._in_flight.append(LedgerStep(batch, results, writers))
        return self._in_flight[-1]

    def launch_tail(self, step: LedgerStep, masks: Masks | None) -> None:
        assert step is self._in_flight[-1], "the tail is that of the last forward"
        assert len(self._in_flight) == 1, "the step before was collected"
        assert masks is None, "stories have no grammar"

    def collect(self, step: LedgerStep) -> Sampled:
        assert step is self._in_flight.popleft(), "steps are collected in the order of their launches"
        return structs.replace(step.results, transfers=self._report(waits=not step.batch.tokens))

    def close(self) -> None:
        assert not self._in_flight

    def _begin(self, transfer: Transfer, returned: int) -> None:
        """Read what is to be moved, and take away what is where it goes."""
        page, slot, move = transfer.page, transfer.slot, transfer.move
        assert slot < self._grown_slots, "there is no such slot yet"
        self.moves.append(transfer)
        for step in self._in_flight:
            assert step.batch.step > returned, "a step is said to be back"
            assert page not in step.writers, f"page {page} is copied while it may be written"
        for other in (moving.transfer for moving in self._transfers):
            if Move.LOAD in (move, other.move):
                assert page != other.page, f"page {page} is loaded while it is copied"
            if {move, other.move} & {Move.STORE, Move.READ}:
                assert slot != other.slot, f"slot {slot} is filled while it is copied"
        match move:
            case Move.STORE:
                content = list(self._pages[page])
                assert -1 not in content, f"page {page} is stored, and is not full"
                self._host[slot] = []
            case Move.LOAD:
                content = list(self._host[slot])
                self._pages[page] = [-1] * self._page_tokens
            case Move.WRITE:
                content = list(self._host[slot])
            case Move.READ:
                content, self._host[slot] = [], []
        self._transfers.append(LedgerTransfer(transfer, content))

    def _report(self, waits: bool) -> TransferReport | None:
        """End some transfers; at least one, if somebody waits for it."""
        if not self._host_slots:
            return None
        rng, before = self._rng, self._grown_slots
        self._grown_slots = self._host_slots if rng is None else min(before + rng.randint(0, 3), self._host_slots)
        least = 1 if waits and self._transfers else 0
        count = len(self._transfers) if rng is None else rng.randint(least, len(self._transfers))
        ended = self._transfers if rng is None else rng.sample(self._transfers, count)
        self._transfers = [moving for moving in self._transfers if moving not in ended]
        failed = [moving.transfer.id for moving in ended if not self._end(moving)]
        done = [moving.transfer.id for moving in ended if moving.transfer.id not in failed]
        return TransferReport(done, failed, self._grown_slots, (1e-3 * count,) * len(Move))

    def _end(self, moving: LedgerTransfer) -> bool:
        transfer, content = moving.transfer, moving.content
        match transfer.move:
            case Move.STORE:
                assert self._pages[transfer.page] == content, "a page has changed while it was stored"
                self._host[transfer.slot] = content
            case Move.LOAD:
                assert self._host[transfer.slot] == content, "a slot has changed while it was loaded"
                self._pages[transfer.page] = content
            case Move.WRITE:
                assert self._host[transfer.slot] == content, "a slot has changed while it was written"
                assert self._disk is not None
                return self._disk.write(transfer.content, content)
            case Move.READ:
                assert self._disk is not None
                found = self._disk.read(transfer.content)
                if found is None:
                    return False
                self._host[transfer.slot] = found
        return True

    def _read(self, slot: int, tokens: int) -> None:
        """Attention reads all earlier positions: they must be this request's."""
        expected = self._slot_stories[slot].entries
        for index, begin in enumerate(range(0, tokens, self._page_tokens)):
            end = min(begin + self._page_tokens, tokens)
            found = self._pages[self._tables[slot][index]][: end - begin]
            assert found == expected[begin:end], f"slot {slot} reads what is not its own in page {index}"

    def _write(self, slot: int, start: int, token_ids: list[int], writers: dict[int, int]) -> None:
        story = self._slot_stories[slot]
        assert token_ids == story.tokens[start : start + len(token_ids)], f"slot {slot} computes other tokens"
        for position in range(start, start + len(token_ids)):
            index, offset = divmod(position, self._page_tokens)
            page = self._tables[slot][index]
            assert writers.setdefault(page, slot) == slot, f"page {page} is written by two slots in one step"
            self._pages[page][offset] = story.entries[position]
