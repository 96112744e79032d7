"""The names of scales, and of experts' tensors, in checkpoints: tools have several for one thing, a loader has one."""

from __future__ import annotations

import re

WEIGHT_SCALE, WEIGHT_SCALE_INV = "weight_scale", "weight_scale_inv"  # both multiply
INPUT_SCALE = "input_scale"
KV_SCALES = ("k_scale", "v_scale")  # of an attention module

_ATTENTION = r"(.+\.self_attn\.)"
_EXPERT = r"(.+\.block_sparse_moe\.experts\.\d+\.)"
SPELLINGS = [  # a pattern for a name as some tool writes it, and the names of what it is here
    (re.compile(pattern), names)
    for pattern, names in (
        (rf"{_ATTENTION}k_proj\.(?:k_scale|output_scale)", (r"\1k_scale",)),  # ModelOpt; compressed-tensors of 2024
        (rf"{_ATTENTION}v_proj\.(?:v_scale|output_scale)", (r"\1v_scale",)),
        (rf"{_ATTENTION}kv_scale", (r"\1k_scale", r"\1v_scale")),  # AutoFP8: one for both
        (r"(.+\.)activation_scale", (rf"\1{INPUT_SCALE}",)),  # transformers
        (rf"{_EXPERT}gate_proj(\..+)", (r"\1w1\2",)),  # llm-compressor
        (rf"{_EXPERT}up_proj(\..+)", (r"\1w3\2",)),
        (rf"{_EXPERT}down_proj(\..+)", (r"\1w2\2",)),
    )
]


def loaders_names(name: str, weight_scale: str = WEIGHT_SCALE) -> tuple[str, ...]:
    """What a loader calls the tensor that a file calls `name`; `weight_scale` is the format's name of such scales."""
    for pattern, names in SPELLINGS:
        if match := pattern.fullmatch(name):
            return tuple(_weight_scale(match.expand(each), weight_scale) for each in names)
    return (_weight_scale(name, weight_scale),)


def _weight_scale(name: str, weight_scale: str) -> str:
    module, _, kind = name.rpartition(".")
    return f"{module}.{weight_scale}" if module and kind in (WEIGHT_SCALE, WEIGHT_SCALE_INV) else name
