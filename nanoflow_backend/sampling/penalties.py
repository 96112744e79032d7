"""Penalties keeps on the device how often each penalised request has had each token, and lowers their logits by it."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch
from nanoflow_kernels.reference_sampling import IN_PROMPT
from torch import Tensor

from nanoflow_backend.runtime.transfer import to_device
from nanoflow_backend.scheduler.batch import Admission

FIRST_ENTRIES = 8  # rows of the table at first; it doubles whenever they are all taken


class Penalties:
    """A table of counts with a row for each request that is penalised: nothing is kept for others.

    E entries (rows of the table), V vocabulary, P penalised rows of a step.
    """

    def __init__(self, num_slots: int, vocab_size: int, kernels: ModuleType, device: torch.device) -> None:
        self._kernels = kernels
        self._seen = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)  # [E, V]
        self._entry = np.full(num_slots, -1, np.int64)
        self._free: list[int] = []
        self._penalties = np.zeros((3, num_slots), np.float32)  # repetition, presence, frequency

    def admit(self, admission: Admission) -> bool:
        """Whether this request is penalised; then its known tokens are counted."""
        slot, params = admission.slot, admission.params
        if self._entry[slot] >= 0:
            self._free.append(int(self._entry[slot]))
            self._entry[slot] = -1
        if not params.penalises:
            return False
        self._entry[slot] = entry = self._take()
        self._penalties[:, slot] = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
        tokens = np.asarray(admission.tokens, np.int64)
        said, counts = np.unique(tokens[admission.prompt_tokens :], return_counts=True)
        row, device = self._seen[entry], self._seen.device
        row.zero_()
        row.index_fill_(0, to_device(tokens[: admission.prompt_tokens], device), IN_PROMPT)
        if len(said):
            row.index_add_(0, to_device(said, device), to_device(counts.astype(np.int32), device))
        return True

    def apply(self, scores: Tensor, slots: np.ndarray) -> Drawing | None:
        """Change scores [R, V] in place; returns what is to be counted when the tokens are drawn."""
        entries = self._entry[slots]
        rows = np.flatnonzero(entries >= 0)
        if not len(rows):
            return None
        rows_, entries_ = to_device(np.stack((rows, entries[rows])), scores.device)
        penalties = to_device(self._penalties.take(slots[rows], axis=1), scores.device)
        self._kernels.penalise(scores, rows_, self._seen, entries_, *penalties)
        return rows_, entries_

    def count(self, drawing: Drawing, ids: Tensor) -> None:
        """These tokens were drawn: ids [R], on the device."""
        rows, entries = drawing
        self._seen[entries, ids[rows]] += 1  # entries differ: no two add to one count

    def _take(self) -> int:
        if not self._free:
            entries = len(self._seen)
            more = max(FIRST_ENTRIES, entries)
            self._seen = torch.cat((self._seen, self._seen.new_zeros(more, self._seen.shape[1])))
            self._free = list(range(entries + more - 1, entries - 1, -1))
        return self._free.pop()


Drawing = tuple[Tensor, Tensor]  # rows [P] of a step, and their entries [P]
