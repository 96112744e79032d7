"""Constraints says which tokens may come next in requests where that depends on their output. Only rank 0 has them.

A mask is made between the last step's results and the tail of this one, while the device runs the forward.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future

import msgspec
import numpy as np
from numpy.typing import NDArray

from nanoflow_backend.request.internal_error import RequestError
from nanoflow_backend.request.sampling_params import SamplingParams
from nanoflow_backend.sampling.grammar import Grammar, Grammars
from nanoflow_backend.scheduler.batch import Admission

Bits = NDArray[np.int32]  # token i is bit i % 32 of word i / 32


class Masks(msgspec.Struct, frozen=True, array_like=True):
    """The tokens allowed in some rows of a step. It crosses the socket to every rank as it is."""

    rows: list[int]
    bits: bytes  # of each of these rows, one after the other

    @property
    def row_numbers(self) -> NDArray[np.int64]:
        return np.array(self.rows, np.int64)

    @property
    def allowed(self) -> Bits:
        """[P, words], a copy that may be written."""
        return np.frombuffer(self.bits, np.int32).reshape(len(self.rows), -1).copy()


class Constraints:
    """Grammars, bad words and allowed token ids, by slot.

    A slot's constraint stays until another request takes the slot: that is soon, and nobody asks for it meanwhile.
    """

    def __init__(self, vocab_size: int, eos_token_ids: Sequence[int], grammars: Grammars) -> None:
        self._grammars = grammars
        self._all = bits_of(range(vocab_size), vocab_size)
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._ends = bits_of((i for i in eos_token_ids if i < vocab_size), vocab_size)
        self._by_slot: dict[int, _Constraint] = {}

    def __bool__(self) -> bool:
        """Some slot may have one."""
        return bool(self._by_slot)

    def prepare(self, params: SamplingParams) -> Future[Grammar] | None:
        """Start to compile what the request needs, on another thread; None where it needs nothing."""
        return self._grammars.compile(params.structured_outputs) if params.structured_outputs else None

    def admit(self, admissions: Iterable[Admission]) -> None:
        for admission in admissions:
            self._by_slot.pop(admission.slot, None)
            if admission.params.is_constrained:
                self._by_slot[admission.slot] = self._open(admission)

    def observe(self, slots: Sequence[int], token_ids: Sequence[int]) -> None:
        """What a step sampled has come back."""
        for slot, token in zip(slots, token_ids, strict=True):
            if slot in self._by_slot:
                self._by_slot[slot].observe(token)

    def masks(self, slots: Sequence[int]) -> Masks | None:
        """For the next token of the requests in these slots; None where all may say anything."""
        rows = [row for row, slot in enumerate(slots) if slot in self._by_slot]
        if not rows:
            return None
        constraints = [self._by_slot[slots[row]] for row in rows]
        allowed = np.tile(self._all, (len(rows), 1))
        self._grammars.fill([(c.grammar, index) for index, c in enumerate(constraints) if c.grammar], allowed)
        for constraint, row in zip(constraints, allowed, strict=True):
            constraint.restrict(row)
            if constraint.grammar and constraint.grammar.failure:  # what comes now is shown to nobody
                row[:] = self._ends
        return Masks(rows, allowed.tobytes())

    def broken(self, slots: Sequence[int]) -> dict[int, RequestError]:
        """Of these slots, those whose grammar cannot go on, with the reason."""
        grammars = {slot: self._by_slot[slot].grammar for slot in slots if slot in self._by_slot}
        return {slot: grammar.failure for slot, grammar in grammars.items() if grammar and grammar.failure}

    def _open(self, admission: Admission) -> _Constraint:
        params, vocab_size = admission.params, self._vocab_size
        grammar = None
        if params.structured_outputs:  # compiled before it was admitted; again, should it have been forgotten since
            grammar = self._grammars.start(params.structured_outputs)
        required = bits_of(params.allowed_token_ids, vocab_size) if params.allowed_token_ids else self._all
        ends = {i for i in (*self._eos_token_ids, *params.stop_token_ids) if i < vocab_size}
        constraint = _Constraint(grammar, required, params, ends)
        for token in admission.tokens[admission.prompt_tokens :]:
            constraint.observe(token)
        return constraint


class _Constraint:
    """One request's. What is required (a grammar, allowed ids) wins over what is banned, where both leave nothing."""

    def __init__(self, grammar: Grammar | None, required: Bits, params: SamplingParams, ends: Iterable[int]) -> None:
        self.grammar = grammar
        self._required = required
        self._min_tokens = params.min_tokens
        self._ends = list(ends)
        self._outputs: list[int] = []
        # By what must have been said before: the tokens that would complete a bad word.
        self._last_tokens: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        for *before, last in params.bad_words_token_ids:
            self._last_tokens[tuple(before)].append(last)
        self._lengths = sorted({len(before) for before in self._last_tokens})

    def observe(self, token: int) -> None:
        self._outputs.append(token)
        if self.grammar:
            self.grammar.advance(token)

    def restrict(self, row: Bits) -> None:
        """Narrow what the grammar allows, in place."""
        row &= self._required if (row & self._required).any() else -1
        banned = [token for length in self._lengths for token in self._last_tokens.get(self._tail(length), ())]
        if len(self._outputs) < self._min_tokens:
            banned += self._ends
        if banned:
            left = row & ~bits_of(banned, 32 * len(row))
            row[:] = left if left.any() else row

    def _tail(self, length: int) -> tuple[int, ...]:
        return tuple(self._outputs[len(self._outputs) - length :]) if length <= len(self._outputs) else (-1,)


def bits_of(tokens: Iterable[int], vocab_size: int) -> Bits:
    """[words] with the bits of these tokens set."""
    flags = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    flags[list(tokens)] = 1
    return np.packbits(flags, bitorder="little").view("<i4")
