#!/bin/bash
# What transformers 5.23.0 leaves of the rope_parameters that a caller passes to GlmConfig.
#
# Guessed: the dictionary stays the caller's own, as it does with LlamaConfig; a default goes into the config's copy.
# Seen: the config holds the very dictionary it was given (so does LlamaConfig's), and GlmConfig and Glm4Config write
# their default into it: partial_rotary_factor 0.5. Whoever makes several configs from one dictionary, as a sweep over
# models does, gets a Llama behind a GLM that rotates half of each head where rope_type is llama3 or linear: 8
# frequencies instead of 16 for heads of 32, and its first forward pass ends in an error of sizes. With rope_type
# default, Llama does not look at the factor, and nothing shows.
#
# Exits 1 if that changes. Needs Python 3 with venv, and pip's index (torch's CPU build will do).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 numpy==1.26.4
cat > "$folder/shared.py" <<'PYTHON'
import sys

import torch
import transformers
from transformers import Glm4Config, GlmConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

SIZES = {
    "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
    "intermediate_size": 64, "vocab_size": 96, "pad_token_id": 0,
}
ROPES = (
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 64},
)


def runs(config):
    try:
        LlamaForCausalLM(config)(torch.arange(8)[None])
    except RuntimeError:
        return False
    return True


print("transformers", transformers.__version__)
as_found = True
for between in (LlamaConfig, GlmConfig, Glm4Config):
    for rope in ROPES:
        shared = dict(rope)
        before = len(LlamaRotaryEmbedding(LlamaConfig(rope_parameters=shared, **SIZES)).inv_freq)
        between(rope_parameters=shared, **SIZES)
        llama = LlamaConfig(rope_parameters=shared, **SIZES)
        after, added = len(LlamaRotaryEmbedding(llama).inv_freq), {k: v for k, v in shared.items() if rope.get(k) != v}
        print(between.__name__, rope["rope_type"], "added", added, "frequencies", before, after, "runs", runs(llama))
        is_glm, halves = between is not LlamaConfig, rope["rope_type"] != "default"
        as_found &= added == ({"partial_rotary_factor": 0.5} if is_glm else {})
        as_found &= (before, after) == (16, 8 if is_glm and halves else 16)
        as_found &= runs(llama) == (not (is_glm and halves))
sys.exit(0 if as_found else 1)
PYTHON
"$folder/venv/bin/python" "$folder/shared.py"
