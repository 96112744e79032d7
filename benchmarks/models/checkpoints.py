"""Tiny random checkpoints are made and saved by transformers: the independent side of every comparison."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    Ernie4_5Config,
    GlmConfig,
    HeliumConfig,
    LlamaConfig,
    MinistralConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
    SmolLM3Config,
)

CONFIGS = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "qwen3_moe": Qwen3MoeConfig,
    "mistral": MistralConfig,
    "ministral": MinistralConfig,
    "mixtral": MixtralConfig,
    "phi3": Phi3Config,
    "seed_oss": SeedOssConfig,
    "smollm3": SmolLM3Config,
    "glm": GlmConfig,
    "ernie4_5": Ernie4_5Config,
    "helium": HeliumConfig,
}
OWN_GRAPHS = ("llama", "qwen2", "mixtral", "qwen3_moe", "smollm3")  # the others have operations of these alone
EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None}
OPTIONS: dict[str, dict[str, Any]] = {  # inner widths of experts: their grouped matmul wants multiples of 4
    "mixtral": EXPERTS | {"intermediate_size": 60},
    # One dense layer, with experts before it and after.
    "qwen3_moe": EXPERTS | {"intermediate_size": 97, "moe_intermediate_size": 60, "mlp_only_layers": [1]},
    "mistral": {"sliding_window": None},
    "ministral": {"sliding_window": 24, "layer_types": ["full_attention", "sliding_attention"]},
    "seed_oss": {"attention_out_bias": True},
    "helium": {"head_dim": 8, "attention_bias": True},  # it can have no other
    # A layer that rotates, and one that does not and has a window; biases of all four projections.
    "smollm3": {
        "no_rope_layers": [1, 0] * 4,
        "use_sliding_window": True,
        "sliding_window": 24,
        "attention_bias": True,
    },
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def make(
    architecture: str,
    *,
    heads: int = 8,
    kv_heads: int = 2,
    head_dim: int = 16,
    llama3_rope: bool = False,
    seed: int = 0,
    **options: Any,
) -> PreTrainedModel:
    """A model in fp32 whose logits spread enough for greedy decoding to have margins."""
    fields: dict[str, Any] = {
        "vocab_size": 331,
        "hidden_size": 64,
        "intermediate_size": 97,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 512,
        "rope_parameters": LLAMA3_ROPE if llama3_rope else {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "attn_implementation": "sdpa",
    }
    fields |= OPTIONS.get(architecture, {})
    torch.manual_seed(seed)
    config = CONFIGS[architecture](**deepcopy(fields | options))  # a config may write into what it is given
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():  # norms and biases start at one and zero, which would hide a mistake in either
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.5)
            else:
                parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
    return model


def save(model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    model.to(dtype).save_pretrained(folder, **options)
    return folder
