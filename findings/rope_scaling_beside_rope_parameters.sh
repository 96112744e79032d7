#!/bin/bash
# What transformers 5.23.0 makes of `rope_scaling` that is added to a config which transformers 5 saved.
#
# Model cards say: to read long texts, add `rope_scaling` with YaRN to config.json. Configs saved by transformers 5 have
# `rope_parameters`, which holds the base of the rotary embedding too.
# Guessed: the added scaling is joined with what is there, so that `rope_theta` stays 1,000,000.
# Seen: it takes the place of `rope_parameters` as a whole, and theta is 10,000, without a word.
#
# Exits 1 if that changes. Needs Python 3 with venv, and pip's index.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0
cat > "$folder/config.json" <<'JSON'
{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 64, "num_attention_heads": 4,
 "num_key_value_heads": 2, "num_hidden_layers": 1, "intermediate_size": 128, "vocab_size": 128,
 "max_position_embeddings": 32768, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
 "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}
JSON
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import json
import sys
from pathlib import Path

import transformers
from transformers import Qwen2Config

folder = Path(sys.argv[1])
both = Qwen2Config.from_pretrained(folder).rope_parameters
fields = json.loads((folder / "config.json").read_text())
del fields["rope_scaling"]
(folder / "config.json").write_text(json.dumps(fields))
alone = Qwen2Config.from_pretrained(folder).rope_parameters
print("transformers", transformers.__version__)
print("rope_parameters alone:            theta", alone["rope_theta"])
print("rope_scaling beside it:           theta", both["rope_theta"], "type", both["rope_type"])
sys.exit((alone["rope_theta"], both["rope_theta"], both["rope_type"]) != (1000000.0, 10000.0, "yarn"))
PYTHON
