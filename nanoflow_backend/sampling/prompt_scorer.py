"""PromptScorer computes the log-probabilities of prompts' tokens, for the requests that ask for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from nanoflow_backend.runtime.transfer import to_device, to_host
from nanoflow_backend.schedule.layout import Layout
from nanoflow_backend.scheduler.batch import Admission, Batch, PromptScores, TokenLogprobs

MOST_ROWS = 256  # of logits at once: 128 MB with 128k tokens


@dataclass(frozen=True)
class Scored:
    """Scores of one prefill chunk on their way to the host."""

    slot: int
    position: int  # of the first token that is scored
    columns: list[tuple[Tensor, ...]]  # ids, log-probabilities, rank, as nanoflow_kernels has them; some rows each

    def scores(self) -> PromptScores:
        """To be read once the device has come here."""
        rows = [row for part in self.columns for row in zip(*(column.tolist() for column in part), strict=True)]
        return PromptScores(self.slot, self.position, [TokenLogprobs(*row) for row in rows])


class PromptScorer:
    """Runs the LM head on all prompt rows of those requests, at most `most_rows` at once."""

    def __init__(self, vocab_size: int, kernels: ModuleType, device: torch.device, most_rows: int) -> None:
        self._vocab_size, self._kernels, self._device = vocab_size, kernels, device
        self._most_rows = min(most_rows, MOST_ROWS)
        self._wanted: dict[int, tuple[list[int], int]] = {}  # by slot: the prompt, and how many alternatives

    def admit(self, admissions: Iterable[Admission]) -> None:
        for admission in admissions:
            self._wanted.pop(admission.slot, None)
            if admission.params.prompt_logprobs is not None:
                prompt = admission.tokens[: admission.prompt_tokens]
                self._wanted[admission.slot] = prompt, admission.params.prompt_logprobs

    def score(self, batch: Batch, layout: Layout | None, head: Callable[[Tensor], Tensor]) -> list[Scored]:
        """Scores of what the batch prefills; `head` gives the logits [rows, V] of rows of the batch as they lie."""
        if not self._wanted:
            return []
        scored, row = [], len(batch.decode_slots)
        for prefill in batch.prefills:
            if prefill.slot in self._wanted:
                prompt, alternatives = self._wanted[prefill.slot]
                if prefill.start < len(prompt):  # not what it had generated before a preemption
                    targets = prompt[prefill.start + 1 : prefill.start + len(prefill.token_ids) + 1]
                    rows = np.arange(row, row + len(targets), dtype=np.int32)
                    columns = self._columns(layout.place[rows] if layout else rows, targets, alternatives, head)
                    scored.append(Scored(prefill.slot, prefill.start + 1, columns))
            row += len(prefill.token_ids)
        return scored

    def _columns(
        self, rows: np.ndarray, targets: list[int], alternatives: int, head: Callable[[Tensor], Tensor]
    ) -> list[tuple[Tensor, ...]]:
        columns = []
        for begin in range(0, len(targets), self._most_rows):
            ids = targets[begin : begin + self._most_rows]
            logits = head(to_device(rows[begin : begin + len(ids)], self._device))[:, : self._vocab_size]
            found = self._kernels.logprobs(logits, to_device(np.array(ids, np.int64), self._device), alternatives)
            columns.append(tuple(to_host(column) for column in found))
        return columns
