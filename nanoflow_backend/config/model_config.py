"""ModelConfig is the shape of a model: what its graphs, weights and pages are made from."""

from __future__ import annotations

from typing import Literal

import msgspec

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.precision import Dtype
from nanoflow_backend.config.quantization import Quantization
from nanoflow_backend.config.rules import Rule, broken, whole

# Wider than any model's, and so that frequencies are neither 0 nor infinite in float32.
FACTOR = Rule("a number > 0, from 0.001 to 1000000", lambda value: 1e-3 <= value <= 1e6)
ROPE_RULES = {
    "theta": Rule("a number > 0, from 1 to 1e15", lambda value: 1 <= value <= 1e15),
    "factor": FACTOR,
    "low_freq_factor": FACTOR,
    "high_freq_factor": FACTOR,
    "attention_factor": FACTOR,
    "beta_fast": FACTOR,
    "beta_slow": FACTOR,
    "partial_rotary_factor": Rule("a number > 0 and <= 1", lambda value: 0 < value <= 1),
    "original_max_position_embeddings": whole(1),
}


class RopeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary embedding. `llama3` scaling (Llama-3.1) and `yarn` stretch low frequencies by `factor`, `linear` all, and
    `longrope` each by a factor of its own: one of `short_factor` or, where requests may be longer than the first
    context, of `long_factor`."""

    theta: float = 10000.0
    scaling: Literal["default", "linear", "llama3", "yarn", "longrope", "dynamic"] = "default"
    partial_rotary_factor: float = 1.0  # the share of a head's dimensions that is rotated: the first ones
    factor: float = 1.0
    low_freq_factor: float = 1.0  # of llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # of yarn
    beta_slow: float = 1.0
    truncate: bool = True  # the ramp begins and ends at whole dimensions
    short_factor: tuple[float, ...] = ()  # of longrope, one for each frequency
    long_factor: tuple[float, ...] = ()
    attention_factor: float = 1.0  # of yarn and longrope: of what is rotated
    original_max_positions: int = 8192  # of llama3, too

    def __post_init__(self) -> None:
        values = {name: getattr(self, name) for name in self.__struct_fields__}
        faults = broken(ROPE_RULES, {**values, "original_max_position_embeddings": self.original_max_positions})
        low, high = self.low_freq_factor, self.high_freq_factor
        if self.scaling == "llama3" and not low < high:
            faults.append(f"expected low_freq_factor < high_freq_factor, got {low}, {high}")
        if self.scaling == "yarn" and self.beta_slow > self.beta_fast:
            faults.append(f"expected beta_slow <= beta_fast, got {self.beta_slow}, {self.beta_fast}")
        for name in ("short_factor", "long_factor"):
            wrong = [factor for factor in getattr(self, name) if not FACTOR.holds(factor)]
            faults += [f"{name}: expected numbers > 0, from 0.001 to 1000000, got {wrong[0]!r}"] if wrong else []
        if self.scaling == "yarn" and self.theta == 1:
            faults.append("expected theta > 1 with yarn, got 1.0")
        if faults:
            raise ConfigError("; ".join(faults))

    @property
    def stretched_positions(self) -> int:
        """The context that `yarn` makes of the first one; 0 where other scalings leave it to the model."""
        return int(self.factor * self.original_max_positions) if self.scaling == "yarn" else 0

    def rotated(self, head_dim: int) -> int:
        """How many dimensions of a head are rotated, as transformers rounds it."""
        return int(head_dim * self.partial_rotary_factor)


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of a model, as models.hugging_face reads it from a folder. Sizes are counts of elements."""

    architecture: str  # its name in models.registry
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_model_tokens: int
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False  # of attention's output projection
    sliding_window: int = 0  # keys that a token attends to, its own among them; 0: all
    full_attention_layers: tuple[int, ...] = ()  # that have no window, though others have
    rotates_neighbours: bool = False  # pairs of a head's dimensions are (0, 1), (2, 3) ...; else (0, d / 2) ...
    unrotated_layers: tuple[int, ...] = ()  # that do not rotate queries and keys: NoPE
    qk_norm: bool = False  # every head of Q and K has an RMS norm, before its rotation
    num_experts: int = 0
    experts_per_token: int = 0
    moe_intermediate_size: int = 0  # of one expert
    norm_topk_prob: bool = True  # the weights of a token's experts sum to 1
    dense_layers: tuple[int, ...] = ()  # that have no experts, though others have
    dtype: Dtype = "bfloat16"  # of the checkpoint's tensors, those that are quantised aside
    quantization: Quantization | None = None
    scaled_kv: bool = False  # K and V are divided by a layer's scales as they go into the pages: these are e4m3
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_heads} is not a multiple of num_key_value_heads {self.num_kv_heads}"
            )
        if self.experts_per_token > self.num_experts:
            raise ConfigError(
                f"num_experts_per_tok {self.experts_per_token} is more than num_local_experts {self.num_experts}"
            )
        rotated = self.rope.rotated(self.head_dim)
        if rotated < 2 or rotated % 2:
            raise ConfigError(
                f"partial_rotary_factor {self.rope.partial_rotary_factor}: expected an even number of dimensions of a "
                f"head ({self.head_dim}), got {rotated}"
            )
        for name in ("short_factor", "long_factor") if self.rope.scaling == "longrope" else ():
            if (count := len(getattr(self.rope, name))) != rotated // 2:
                raise ConfigError(f"{name}: expected {rotated // 2} numbers, one for each frequency, got {count}")
