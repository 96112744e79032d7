"""Rotary frequencies: how far each pair of a head's dimensions turns from one position to the next."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nanoflow_backend.config.model_config import ModelConfig, RopeConfig
from nanoflow_backend.graph.builder import GraphBuilder


def frequencies(g: GraphBuilder, config: ModelConfig) -> str:
    """The constant with the frequencies of each pair of dimensions that is rotated, in radians a position."""
    half = config.rope.rotated(config.head_dim) // 2
    plain = [config.rope.theta ** (-i / half) for i in range(half)]
    return g.constant("rope.frequencies", tuple(scale_frequencies(plain, config.rope, config.max_model_tokens)))


def no_rotation(g: GraphBuilder, config: ModelConfig) -> str:
    """The constant of a layer that rotates nothing: turning by 0 changes no bit."""
    return g.constant("rope.frequencies", (0.0,) * (config.rope.rotated(config.head_dim) // 2))


def scale_frequencies(plain: Sequence[float], rope: RopeConfig, max_model_tokens: int) -> list[float]:
    """Stretch a rotation for contexts longer than those that the model was first trained on.

    `dynamic` does so only beyond max_position_embeddings, and no request is longer. `longrope` has one rotation for
    all requests: that of long contexts where any may be longer than the first context.
    """
    if rope.scaling in ("default", "dynamic"):
        return list(plain)
    if rope.scaling == "longrope":
        factors = rope.long_factor if max_model_tokens > rope.original_max_positions else rope.short_factor
        return [frequency / factor for frequency, factor in zip(plain, factors, strict=True)]
    if rope.scaling == "linear":
        return [frequency / rope.factor for frequency in plain]
    kept = _kept_by_yarn(len(plain), rope) if rope.scaling == "yarn" else [_kept_by_llama3(f, rope) for f in plain]
    return [keep * f + (1 - keep) * f / rope.factor for keep, f in zip(kept, plain, strict=True)]


def _kept_by_llama3(frequency: float, rope: RopeConfig) -> float:
    """How much of a frequency stays: all of it where it turns often in the first context, nothing where rarely."""
    turns = rope.original_max_positions * frequency / (2 * math.pi)
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return min(max(keep, 0.0), 1.0)


def _kept_by_yarn(half: int, rope: RopeConfig) -> list[float]:
    """How much of each frequency stays: a ramp over the dimensions, between those that turn `beta_fast` and
    `beta_slow` times in the first context. Reference: Peng et al., "YaRN", ICLR 2024."""

    def dimension(turns: float) -> float:
        return half * math.log(rope.original_max_positions / (turns * 2 * math.pi)) / math.log(rope.theta)

    first, last = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    last += 0.001 if first == last else 0
    return [1 - min(max((i - first) / (last - first), 0.0), 1.0) for i in range(half)]
