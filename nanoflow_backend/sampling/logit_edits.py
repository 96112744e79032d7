"""LogitBias and MinTokens change a few logits of a row, by the request's parameters and the row's position alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nanoflow_backend.runtime.transfer import to_device
from nanoflow_backend.scheduler.batch import Admission


class LogitBias:
    """Adds what each request asked for to the logits of the tokens it named."""

    def __init__(self, num_slots: int) -> None:
        self._tokens = [np.zeros(0, np.int64)] * num_slots
        self._biases = [np.zeros(0, np.float32)] * num_slots

    def admit(self, admission: Admission) -> bool:
        """Whether it concerns this request."""
        bias = admission.params.logit_bias
        self._tokens[admission.slot] = np.fromiter(bias.keys(), np.int64, len(bias))
        self._biases[admission.slot] = np.fromiter(bias.values(), np.float32, len(bias))
        return bool(bias)

    def apply(self, scores: Tensor, slots: np.ndarray) -> None:
        """Change scores [R, V] in place."""
        tokens = [self._tokens[slot] for slot in slots]
        rows = np.repeat(np.arange(len(slots)), [len(ids) for ids in tokens])
        if len(rows):
            row, token = to_device(np.stack((rows, np.concatenate(tokens))), scores.device)
            scores[row, token] += to_device(np.concatenate([self._biases[slot] for slot in slots]), scores.device)


class MinTokens:
    """No EOS and no stop token id before `min_tokens` outputs; with ignore_eos, too, EOS is not drawn before.

    Of constrained requests this is part of their masks: where a grammar allows nothing but the end, it ends.
    """

    def __init__(self, num_slots: int, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self.first_free_position = np.zeros(num_slots, np.int64)
        self.banned: list[list[int]] = [[] for _ in range(num_slots)]

    def admit(self, admission: Admission) -> bool:
        """Whether it concerns this request."""
        params, slot = admission.params, admission.slot
        concerned = params.min_tokens > 0 and not params.is_constrained
        # Output k is drawn at position prompt_tokens + k - 1.
        self.first_free_position[slot] = admission.prompt_tokens - 1 + params.min_tokens if concerned else 0
        self.banned[slot] = [i for i in {*self.eos_token_ids, *params.stop_token_ids} if i < self.vocab_size]
        return concerned

    def apply(self, scores: Tensor, slots: np.ndarray, positions: np.ndarray) -> None:
        """Change scores [R, V] in place."""
        rows = np.flatnonzero(positions < self.first_free_position[slots])
        pairs = [(row, token) for row in rows for token in self.banned[slots[row]]]
        if pairs:
            row, token = to_device(np.array(pairs, np.int64).T, scores.device)
            scores.index_put_((row, token), scores.new_full((), -torch.inf))  # a number would be sent, and waited for
