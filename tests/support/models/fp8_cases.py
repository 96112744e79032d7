"""Models in FP8 of every form that quantization has, in shapes that both programs take."""

from __future__ import annotations

from support.models.shapes import config

from nanoflow_backend.config.quantization import AT_LOAD, Quantization

STATIC = Quantization(method="modelopt", weights="tensor", activations="static")
LIMITED = Quantization(method="fbgemm_fp8", activation_limit=1.5)
BLOCKS = Quantization(method="fp8", weights="block", activations="group")
WIDE = {
    "num_layers": 2,
    "hidden_size": 128,
    "intermediate_size": 256,
    "head_dim": 64,
    "num_heads": 4,
    "num_kv_heads": 2,
}
CASES = {
    "llama, a scale a row and token": config("llama", quantization=AT_LOAD, **WIDE),
    "llama, and e4m3 pages": config("llama", quantization=AT_LOAD, scaled_kv=True, **WIDE),
    "llama, e4m3 pages alone": config("llama", scaled_kv=True, **WIDE),
    "qwen2, static scales": config("qwen2", quantization=STATIC, scaled_kv=True, **WIDE),
    "qwen2, limited scales": config("qwen2", quantization=LIMITED, **WIDE),
    "llama, blocks": config("llama", quantization=BLOCKS, **WIDE),
    "mixtral": config("mixtral", quantization=AT_LOAD, scaled_kv=True, **WIDE),
    "mixtral, static scales": config("mixtral", quantization=STATIC, **WIDE),
}
