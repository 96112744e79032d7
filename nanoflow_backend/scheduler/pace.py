"""Pace cuts prompts so that a step with decodes takes no longer than a target, by how long steps have taken so far."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MEMORY = 0.95  # what a step keeps of its weight when the next one comes: some twenty steps count
TRUST = 1e-2  # weight of what was known before: it holds where steps say nothing, as of prompts while there are none
LEAST_TOKENS = 64  # of prompts: they get on beside decodes that take the target alone
FIRST_TOKENS = 256  # of prompts, before a step with some has been timed
SCALE = np.array([1.0, 1.0 / 65536, 1.0 / 512])  # of a StepWork, as `_row` has it: numbers of size 1


class StepWork(NamedTuple):
    """What a step's time depends on."""

    decodes: int
    decode_kv_tokens: int  # keys that its decodes read
    prompt_tokens: int

    @property
    def tokens(self) -> int:
        """Of the whole step."""
        return self.decodes + self.prompt_tokens


class Pace:
    """Fits seconds = a + b decode_kv_tokens + c prompt_tokens to the last steps, by weighted least squares.

    A line is enough: it is asked about steps much like those before. A step without decodes keeps nobody waiting for a
    next token, and may be as long as it likes.

    Args:
        target_s: for a step, and so for the time between two tokens of a request.
        most_tokens: of prompts in a step.
    """

    def __init__(self, target_s: float, most_tokens: int) -> None:
        self._target_s = target_s
        self._most_tokens = most_tokens
        self._normal: NDArray[np.float64] = np.zeros((3, 3))  # sum of weight row row^T
        self._moments: NDArray[np.float64] = np.zeros(3)  # sum of weight row seconds
        self._known: NDArray[np.float64] = np.zeros(3)  # a, b and c, each over its SCALE
        self._has_seen_prompts = False

    def measured(self, work: StepWork, seconds: float) -> None:
        """A step of this work took so long."""
        row = _row(work.decode_kv_tokens, work.prompt_tokens)
        self._normal = MEMORY * self._normal + np.outer(row, row)
        self._moments = MEMORY * self._moments + row * seconds
        self._known = np.linalg.solve(self._normal + TRUST * np.eye(3), self._moments + TRUST * self._known).clip(
            min=0.0
        )
        self._has_seen_prompts |= work.prompt_tokens > 0

    def prompt_tokens(self, decodes: int, decode_kv_tokens: int) -> int:
        """Tokens of prompts that a step with these decodes may have."""
        if not decodes:
            return self._most_tokens
        if not self._has_seen_prompts:
            return min(FIRST_TOKENS, self._most_tokens)
        left_s = self._target_s - self._known @ _row(decode_kv_tokens, 0)
        each_s = self._known[2] * SCALE[2]
        if left_s >= each_s * self._most_tokens:
            return self._most_tokens
        if left_s <= each_s * LEAST_TOKENS:  # also where prompts seem to cost nothing, and decodes take the target
            return min(LEAST_TOKENS, self._most_tokens)
        return int(left_s / each_s)


def _row(decode_kv_tokens: int, prompt_tokens: int) -> NDArray[np.float64]:
    return SCALE * (1.0, decode_kv_tokens, prompt_tokens)
