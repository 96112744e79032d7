"""Sampler: what each slot asked of sampling, and logits to token ids by it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple, Protocol

import numpy as np
import torch
from nanoflow_kernels import reference_sampling
from torch import Tensor

from nanoflow_backend.engine.transfer import to_device, to_host
from nanoflow_backend.scheduler.batch import Admission, TokenLogprobs


class LogitsProcessor(Protocol):
    """Changes logits before a token is drawn from them; log-probabilities are of the logits before."""

    def admit(self, admission: Admission) -> None:
        """A new request takes its slot: forget the one before."""

    def __call__(self, logits: Tensor, slots: np.ndarray, positions: np.ndarray) -> Tensor:
        """New logits [R, V]; the same tensor where no row is concerned. Never changes its argument."""


class MinTokens:
    """No EOS and no stop token id before `min_tokens` outputs; with ignore_eos, too, EOS is not drawn before."""

    def __init__(self, num_slots: int, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self.first_free_position = np.zeros(num_slots, np.int64)
        self.banned: list[list[int]] = [[] for _ in range(num_slots)]

    def admit(self, admission: Admission) -> None:
        params, slot = admission.params, admission.slot
        # Output k is drawn at position prompt_tokens + k - 1.
        self.first_free_position[slot] = admission.prompt_tokens - 1 + params.min_tokens
        self.banned[slot] = [i for i in {*self.eos_token_ids, *params.stop_token_ids} if i < self.vocab_size]

    def __call__(self, logits: Tensor, slots: np.ndarray, positions: np.ndarray) -> Tensor:
        rows = np.flatnonzero(positions < self.first_free_position[slots])
        pairs = [(row, token) for row in rows for token in self.banned[slots[row]]]
        if not pairs:
            return logits
        row, token = to_device(np.array(pairs, np.int64).T, logits.device)
        return logits.index_put((row, token), logits.new_tensor(-torch.inf))


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities on their way to the host, of those rows that asked for them."""

    rows: np.ndarray
    wanted: np.ndarray  # of each of these rows, how many alternatives
    columns: tuple[Tensor, ...]  # ids, log-probabilities, rank, as nanoflow_kernels has them

    def by_row(self) -> dict[int, TokenLogprobs]:
        """To be read once the device has come here."""
        columns = (column.tolist() for column in self.columns)
        return {
            int(row): TokenLogprobs(tokens[: 1 + wanted], values[: 1 + wanted], rank)
            for row, wanted, tokens, values, rank in zip(self.rows, self.wanted, *columns, strict=True)
        }


class Drawn(NamedTuple):
    token_ids: Tensor  # int64 [R], on the device of the logits
    logprobs: Logprobs


class Sampler:
    """The sampling state of every slot, filled from admissions. What changes logits is a list, applied in order."""

    def __init__(
        self,
        num_slots: int,
        vocab_size: int,
        eos_token_ids: Sequence[int] = (),
        kernels: ModuleType = reference_sampling,
    ) -> None:
        self.vocab_size = vocab_size
        self._kernels = kernels
        self.temperature = np.zeros(num_slots, np.float64)
        self.top_k = np.zeros(num_slots, np.int64)
        self.top_p = np.ones(num_slots, np.float64)
        self.seed = np.zeros(num_slots, np.int64)
        self.logprobs = np.full(num_slots, -1, np.int64)  # how many alternatives to report; -1: no log-probabilities
        self.processors: list[LogitsProcessor] = [MinTokens(num_slots, vocab_size, eos_token_ids)]

    def admit(self, admissions: Iterable[Admission]) -> None:
        """Requests take their slots. Their params carry a seed, unless they are greedy."""
        for admission in admissions:
            slot, params = admission.slot, admission.params
            self.temperature[slot] = params.temperature
            self.top_k[slot] = params.top_k
            self.top_p[slot] = params.top_p
            self.seed[slot] = params.seed or 0
            self.logprobs[slot] = -1 if params.logprobs is None else params.logprobs
            for processor in self.processors:
                processor.admit(admission)

    def sample(self, logits: Tensor, slots: Sequence[int], positions: Sequence[int]) -> Drawn:
        """A token for each row, and the log-probabilities of those rows that asked for them. Waits for nothing.

        logits [R, V or padded beyond] fp32, kept as it is; slots [R]; positions [R] of the tokens that were read.
        """
        slots_, positions_ = np.asarray(slots, np.int64), np.asarray(positions, np.int64)
        raw = logits[:, : self.vocab_size]
        scores = raw
        for processor in self.processors:
            scores = processor(scores, slots_, positions_)
        if self.temperature[slots_].any():
            columns = (self.temperature[slots_], self.top_k[slots_], self.top_p[slots_], self.seed[slots_], positions_)
            ids = self._kernels.sample(scores, *(to_device(column, scores.device) for column in columns))
        else:
            ids = scores.argmax(-1)
        return Drawn(ids, self._logprobs(raw, ids, self.logprobs[slots_]))

    def _logprobs(self, logits: Tensor, ids: Tensor, wanted: np.ndarray) -> Logprobs:
        rows = np.flatnonzero(wanted >= 0)
        if not len(rows):
            return Logprobs(rows, rows, ())
        rows_ = to_device(rows, logits.device)
        columns = self._kernels.logprobs(logits[rows_], ids[rows_], int(wanted.max()))
        return Logprobs(rows, wanted[rows], tuple(to_host(column) for column in columns))
