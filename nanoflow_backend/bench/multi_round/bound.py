"""Bound says what no engine can beat on given rounds: tokens that must be computed, and the time they take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import msgspec

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.scheduler.batch import Batch


@dataclass(frozen=True)
class StepCost:
    """What a step takes, in seconds: measured for Llama-3-8B in bf16 on an H200, 1024/512 and decode steps.

    The attention of prompts is in the cost of a token, as it is at some hundred tokens of context.
    """

    least_s: float = 5.6e-3  # a step of few tokens reads the weights: 6.9, 8.5, 10.9 ms at 32, 64, 128 decodes
    token_s: float = 22.3e-6  # a row through all layers: 27,400 tokens/s of 1024/512, less the next
    kv_token_s: float = 33.4e-9  # a token of the KV cache that a decode reads

    @classmethod
    def parse(cls, text: str) -> StepCost:
        """Read "5.6,22.3,33.4": milliseconds, microseconds and nanoseconds of the three.

        Raises:
            ConfigError: it is not three numbers above 0.
        """
        try:
            least_ms, token_us, kv_token_ns = (float(number) for number in text.split(","))
        except ValueError:
            least_ms = token_us = kv_token_ns = 0.0
        if not min(least_ms, token_us, kv_token_ns) > 0:
            raise ConfigError(f"--step-cost: expected three numbers above 0 such as 5.6,22.3,33.4, got {text}")
        return cls(least_ms / 1e3, token_us / 1e6, kv_token_ns / 1e9)

    def of(self, tokens: int, decode_kv_tokens: int) -> float:
        return max(self.least_s, tokens * self.token_s) + decode_kv_tokens * self.kv_token_s

    def of_batch(self, batch: Batch) -> float:
        return self.of(batch.tokens, batch.decode_kv_tokens)


class RoundLengths(Protocol):
    """What a round costs depends on."""

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def new_tokens(self) -> int:
        """Of the prompt, those that no earlier round of the conversation had."""
        ...

    @property
    def output_tokens(self) -> int: ...


class Bound(msgspec.Struct, frozen=True):
    """Of rounds, with every token computed once, against prompts computed anew in each round."""

    rounds: int
    prompt_tokens: int  # of all rounds
    new_prompt_tokens: int  # of these, those that no earlier round of the conversation had
    output_tokens: int
    decode_kv_tokens: int  # of the KV cache, read by all decodes
    rounds_per_s: float
    recomputing_rounds_per_s: float

    @property
    def saved_prompt_tokens(self) -> int:
        return self.prompt_tokens - self.new_prompt_tokens

    @property
    def fewer_prompt_tokens(self) -> float:
        """Times fewer prompt tokens to compute."""
        return self.prompt_tokens / self.new_prompt_tokens

    @property
    def speedup(self) -> float:
        """Over recomputing."""
        return self.rounds_per_s / self.recomputing_rounds_per_s

    @classmethod
    def of(cls, rounds: Iterable[RoundLengths], cost: StepCost, kv_cache_tokens: int) -> Bound:
        """`kv_cache_tokens` of the device hold what a step reads, and so bound the decodes of a step.

        No step takes less than its tokens or the weights, and there are at least as many as decodes fit into.
        """
        count = prompts = new = outputs = kv_tokens = 0
        for lengths in rounds:
            count += 1
            prompts += lengths.prompt_tokens
            new += lengths.new_tokens
            outputs += lengths.output_tokens
            decodes = lengths.output_tokens - 1  # the prompt's last row gives the first token
            kv_tokens += decodes * lengths.prompt_tokens + decodes * (decodes + 1) // 2
        least_s = cost.least_s * kv_tokens / kv_cache_tokens

        def rounds_per_s(prompt_tokens: int) -> float:
            computed_s = (prompt_tokens + outputs - count) * cost.token_s
            return count / (max(least_s, computed_s) + kv_tokens * cost.kv_token_s)

        return cls(count, prompts, new, outputs, kv_tokens, rounds_per_s(new), rounds_per_s(prompts))

    def facts(self) -> dict[str, float]:
        """For a result."""
        return {
            **msgspec.to_builtins(self),
            "rounds_per_s": round(self.rounds_per_s, 3),
            "recomputing_rounds_per_s": round(self.recomputing_rounds_per_s, 3),
            "saved_prompt_tokens": self.saved_prompt_tokens,
            "fewer_prompt_tokens": round(self.fewer_prompt_tokens, 3),
            "speedup": round(self.speedup, 3),
        }
