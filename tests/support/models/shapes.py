"""Small model shapes of every architecture."""

from __future__ import annotations

from typing import Any

from nanoflow_backend.config.model_config import ModelConfig, RopeConfig

CONFIGS = ("llama", "qwen2", "mixtral")  # graphs of other families have operations like these
WITH_NORMS = (*CONFIGS, "qwen3_moe")


def config(architecture: str, **fields: Any) -> ModelConfig:
    """8 heads share 2 kv heads; no width but the hidden one is a power of two."""
    moe = {"num_experts": 8, "experts_per_token": 2, "moe_intermediate_size": fields.get("intermediate_size", 37)}
    shape: dict[str, Any] = {
        "vocab_size": 67,
        "hidden_size": 16,
        "intermediate_size": 37,
        "num_layers": 3,
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 4,
        "rms_norm_eps": 1e-5,
        "rope": RopeConfig(),
        "max_model_tokens": 256,
        "qkv_bias": architecture == "qwen2",
        "qk_norm": architecture in ("qwen3", "qwen3_moe"),
    }
    has_experts = architecture in ("mixtral", "qwen3_moe")
    return ModelConfig(architecture=architecture, **shape | (moe if has_experts else {}) | fields)
