"""Slots hold the sequences that run: a slot is a sequence's row in the worker's tables."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator
from itertools import chain

from nanoflow_backend.scheduler.sequence import Sequence, State


class Slots:
    """The sequences with a slot, by slot and in order of arrival in their state."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.free = list(range(count - 1, -1, -1))  # a stack, the lowest slot on top
        self.loading: dict[int, Sequence] = {}
        self.prefilling: dict[int, Sequence] = {}
        self.decoding: dict[int, Sequence] = {}
        self.retiring: dict[int, Sequence] = {}
        self._by_state = {
            State.LOADING: self.loading,
            State.PREFILLING: self.prefilling,
            State.DECODING: self.decoding,
            State.RETIRING: self.retiring,
        }

    def __iter__(self) -> Iterator[Sequence]:
        return chain.from_iterable(sequences.values() for sequences in self._by_state.values())

    def __len__(self) -> int:
        return self.count - len(self.free)

    def at(self, slot: int) -> Sequence:
        """Raises: KeyError, the slot is free."""
        return ChainMap(self.decoding, self.prefilling, self.retiring, self.loading)[slot]

    @property
    def running(self) -> Iterator[Sequence]:
        """Those that get further steps."""
        return chain(self.loading.values(), self.prefilling.values(), self.decoding.values())

    def enter(self, s: Sequence) -> None:
        """Give a sequence a slot."""
        s.slot = self.free.pop()
        self._place(s, State.PREFILLING)

    def move(self, s: Sequence, state: State) -> None:
        """Take a sequence from its state to another one, behind those that are there."""
        del self._by_state[s.state][s.slot]
        self._place(s, state)

    def remove(self, s: Sequence) -> None:
        del self.retiring[s.slot]
        self.free.append(s.slot)

    def check(self) -> None:
        """Raise AssertionError if a slot is lost or taken twice, or a sequence is not where its state says."""
        assert sorted([s.slot for s in self] + self.free) == list(range(self.count)), "a slot is lost or taken twice"
        for state, sequences in self._by_state.items():
            for slot, s in sequences.items():
                assert s.state is state, f"request {s.id} is {s.state.name}, among the {state.name}"
                assert s.slot == slot, f"request {s.id} has slot {s.slot}, and is found at {slot}"

    def _place(self, s: Sequence, state: State) -> None:
        s.state = state
        self._by_state[state][s.slot] = s
