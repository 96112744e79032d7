"""Qwen2: Llama with a bias on Q, K and V, which `config.qkv_bias` already says."""

from nanoflow_backend.models.llama import embed, head, layer

__all__ = ["embed", "head", "layer"]
