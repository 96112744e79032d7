"""LedgerExecutor is an Executor whose model is arithmetic and whose KV pages say what was written into them.

The entry of a position is a number made of every token up to there, so a page that was shared wrongly, reused too
early or never written does not hold what its reader expects. A page that is loaded from a lower tier holds nothing
until the step that carries its load is collected. The next token is a function of that number, so a token that is lost
or doubled changes all that follow.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace

from nanoflow_backend.kvcache.tier import Direction
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
    loads: dict[int, list[int]]  # by page, what is loaded into it when the step is collected


class LedgerExecutor:
    """Runs batches in order; everything that it knows of a request comes from them, and from its story by its seed."""

    def __init__(self, num_pages: int, page_tokens: int) -> None:
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
        self._lower: dict[int, list[int]] = {}  # what the slots of the tier below hold

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
        loads = self._transfer(batch)
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
                assert page not in earlier.loads, f"page {page} is written while it is loaded"
        assert not writers.keys() & loads.keys(), "a page is written in the step that loads it"
        ends = {slot: start + len(token_ids) for slot, start, token_ids in rows}
        for slot in batch.sampled_slots:
            self._last_sample[slot] = self._slot_stories[slot].tokens[ends[slot]]
        scores = [
            PromptScores(p.slot, p.start + 1, [TokenLogprobs([token], [-1.0], 1) for token in prompt[p.start + 1 :]])
            for p in batch.prefills
            if p.start < len(prompt := self._scored_prompts.get(p.slot, [])[: p.start + len(p.token_ids) + 1])
        ]
        results = Sampled(batch.step, [self._last_sample[slot] for slot in batch.sampled_slots], {}, scores)
        self._in_flight.append(LedgerStep(batch, results, writers, loads))
        return self._in_flight[-1]

    def launch_tail(self, step: LedgerStep, masks: Masks | None) -> None:
        assert step is self._in_flight[-1], "the tail is that of the last forward"
        assert len(self._in_flight) == 1, "the step before was collected"
        assert masks is None, "stories have no grammar"

    def collect(self, step: LedgerStep) -> Sampled:
        assert step is self._in_flight.popleft(), "steps are collected in the order of their launches"
        for page, content in step.loads.items():
            self._pages[page] = content
        return step.results

    def close(self) -> None:
        assert not self._in_flight

    def _transfer(self, batch: Batch) -> dict[int, list[int]]:
        """Store at once, and load when the step is collected: until then a page that is loaded holds nothing."""
        loads: dict[int, list[int]] = {}
        for transfer in batch.transfers:
            for earlier in self._in_flight:
                assert transfer.page not in earlier.writers, f"page {transfer.page} is copied while it may be written"
                assert transfer.page not in earlier.loads, f"page {transfer.page} is copied while it is loaded"
            assert transfer.page not in loads, f"page {transfer.page} is copied in the step that loads it"
            if transfer.direction is Direction.STORE:
                self._lower[transfer.tier_slot] = list(self._pages[transfer.page])
            else:
                loads[transfer.page] = list(self._lower[transfer.tier_slot])
                self._pages[transfer.page] = [-1] * self._page_tokens
        return loads

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
