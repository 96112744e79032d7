"""Sampler draws a token id from each row of logits, as the request in the row's slot asked for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from nanoflow_kernels import reference_sampling
from numpy.typing import ArrayLike
from torch import Tensor

from nanoflow_backend.request.sampling_params import SamplingParams
from nanoflow_backend.runtime.transfer import to_device, to_host
from nanoflow_backend.sampling.constraints import Masks
from nanoflow_backend.sampling.logit_edits import LogitBias, MinTokens
from nanoflow_backend.sampling.penalties import Drawing, Penalties
from nanoflow_backend.scheduler.batch import Admission, TokenLogprobs

CPU = torch.device("cpu")
KINDS_OF_REQUESTS = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0, seed=0, top_p=0.9, repetition_penalty=1.1, logprobs=1),
)


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities on their way to the host, of those rows that asked for them."""

    slots: np.ndarray  # of these rows
    wanted: np.ndarray  # of each of them, how many alternatives
    columns: tuple[Tensor, ...]  # ids, log-probabilities, rank, as nanoflow_kernels has them

    def by_slot(self) -> dict[int, TokenLogprobs]:
        """To be read once the device has come here."""
        columns = (column.tolist() for column in self.columns)
        return {
            int(slot): TokenLogprobs(tokens[: 1 + wanted], values[: 1 + wanted], rank)
            for slot, wanted, tokens, values, rank in zip(self.slots, self.wanted, *columns, strict=True)
        }


class Drawn(NamedTuple):
    """What one step drew, on the device."""

    token_ids: Tensor  # int64 [R], on the device of the logits
    logprobs: Logprobs


class Sampler:
    """The sampling state of every slot, filled from admissions."""

    def __init__(
        self,
        num_slots: int,
        vocab_size: int,
        eos_token_ids: Sequence[int] = (),
        kernels: ModuleType = reference_sampling,
        device: torch.device = CPU,
    ) -> None:
        self.vocab_size = vocab_size
        self._kernels = kernels
        self._floats = np.zeros((3, num_slots), np.float64)  # temperature, top_p, min_p
        self._ints = np.zeros((2, num_slots), np.int64)  # top_k, seed
        self._logprobs_wanted = np.full(num_slots, -1, np.int64)  # how many alternatives; -1: no log-probabilities
        self._edits = np.zeros(num_slots, np.bool_)  # logits are not sampled from as they are
        self._bias = LogitBias(num_slots)
        self._min_tokens = MinTokens(num_slots, vocab_size, eos_token_ids)
        self._penalties = Penalties(num_slots, vocab_size, kernels, device)

    def admit(self, admissions: Iterable[Admission]) -> None:
        """Requests take their slots. Their params carry a seed, unless they are greedy."""
        for admission in admissions:
            slot, params = admission.slot, admission.params
            self._floats[:, slot] = params.temperature, params.top_p, params.min_p
            self._ints[:, slot] = params.top_k, params.seed or 0
            self._logprobs_wanted[slot] = -1 if params.logprobs is None else params.logprobs
            stages = (self._bias, self._min_tokens, self._penalties)
            concerned = [stage.admit(admission) for stage in stages]  # all of them: each must forget who was here
            self._edits[slot] = any(concerned)

    def sample(self, logits: Tensor, slots: ArrayLike, positions: ArrayLike, masks: Masks | None = None) -> Drawn:
        """A token for each row, and the log-probabilities of those rows that asked for them. Waits for nothing.

        Log-probabilities are of the logits as they come; tokens are drawn after logit_bias, min_tokens, penalties and
        masks, in this order.

        logits [R, V or padded beyond] fp32, kept as it is; slots [R]; positions [R] of the tokens that were read.
        """
        slots_, positions_ = np.asarray(slots, np.int64), np.asarray(positions, np.int64)
        raw = logits[:, : self.vocab_size]
        scores, drawing = raw, None
        if masks is not None or self._edits[slots_].any():
            scores = raw.clone()
            drawing = self._edit(scores, slots_, positions_, masks)
        floats = self._floats.take(slots_, axis=1)
        if floats[0].any():
            ints = np.concatenate((self._ints.take(slots_, axis=1), positions_[None]))
            temperature, top_p, min_p = to_device(floats, scores.device)
            top_k, seed, position = to_device(ints, scores.device)
            ids = self._kernels.sample(scores, temperature, top_k, top_p, min_p, seed, position)
        else:
            ids = self._kernels.greedy(scores)
        if drawing:
            self._penalties.count(drawing, ids)
        return Drawn(ids, self._logprobs(raw, ids, slots_))

    def _edit(self, scores: Tensor, slots: np.ndarray, positions: np.ndarray, masks: Masks | None) -> Drawing | None:
        self._bias.apply(scores, slots)
        self._min_tokens.apply(scores, slots, positions)
        drawing = self._penalties.apply(scores, slots)
        if masks is not None:
            rows, allowed = to_device(masks.row_numbers, scores.device), to_device(masks.allowed, scores.device)
            self._kernels.mask(scores, rows, allowed)
        return drawing

    def _logprobs(self, logits: Tensor, ids: Tensor, slots: np.ndarray) -> Logprobs:
        wanted = self._logprobs_wanted[slots]
        rows = np.flatnonzero(wanted >= 0)
        if not len(rows):
            return Logprobs(rows, rows, ())
        rows_ = to_device(rows, logits.device)
        columns = self._kernels.logprobs(logits[rows_], ids[rows_], int(wanted.max()))
        return Logprobs(slots[rows], wanted[rows], tuple(to_host(column) for column in columns))


def warm_up(logits: Tensor, vocab_size: int, kernels: ModuleType) -> None:
    """Sample from logits [R, V or padded beyond] for requests of every kind: on a GPU that compiles what they need, so
    that none of them waits for it later."""
    rows = list(range(len(logits)))
    for params in KINDS_OF_REQUESTS:
        sampler = Sampler(len(rows), vocab_size, (), kernels, logits.device)
        sampler.admit(Admission(slot, 1, params, [0]) for slot in rows)
        everything = np.full((len(rows), -(-vocab_size // 32)), -1, np.int32)
        sampler.sample(logits, rows, [1] * len(rows), Masks(rows, everything.tobytes()))
