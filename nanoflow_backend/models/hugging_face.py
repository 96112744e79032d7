"""read_model_config reads a ModelConfig from a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.file import convert, read_json
from nanoflow_backend.config.model_config import ModelConfig
from nanoflow_backend.model_folder import what_is_wrong
from nanoflow_backend.models.architecture import Architecture
from nanoflow_backend.models.config_json import ConfigJson
from nanoflow_backend.models.quantization.modelopt import OWN_FILE
from nanoflow_backend.models.quantization.read import read_quantization
from nanoflow_backend.models.refused import MISSING
from nanoflow_backend.models.registry import ARCHITECTURES
from nanoflow_backend.models.rope_json import read_rope

MOST_HEAD_DIM = 4096


def read_model_config(folder: Path) -> ModelConfig:
    """Read config.json, generation_config.json and ModelOpt's own file; keys may be spelled as before or since
    transformers 5.

    Raises:
        ConfigError: a missing file or key, or a feature this engine does not compute.
    """
    if wrong := what_is_wrong(folder):
        raise ConfigError(wrong)
    generation, modelopt = folder / "generation_config.json", folder / OWN_FILE
    return from_hf(
        read_json(folder / "config.json"),
        read_json(generation) if generation.exists() else {},
        origin=str(folder / "config.json"),
        modelopt=read_json(modelopt) if modelopt.exists() else None,
    )


def from_hf(
    given: Mapping[str, Any],
    generation: Mapping[str, Any],
    origin: str = "config.json",
    modelopt: Mapping[str, Any] | None = None,
) -> ModelConfig:
    """Read what the files hold. A key that is absent means what transformers' class means by that.

    Raises:
        ConfigError: naming `origin`, the key and what was expected.
    """
    architecture = _architecture(given, origin)
    hf = ConfigJson(given, architecture.defaults, origin)
    hf.refuse_if(hf["hidden_act"] != "silu", f"hidden_act {hf['hidden_act']!r} (only silu)")
    hf.refuse_if(hf.flag("attention_bias") and "attention_bias" not in architecture.honours, "attention_bias")
    hf.refuse_if(hf.flag("mlp_bias"), "mlp_bias")
    quantization = read_quantization(given, modelopt, origin)
    if quantization is not None:
        quantization = replace(quantization, wholes=architecture.wholes)
    num_layers, kinds = hf.repeats("num_hidden_layers"), hf["layer_types"]
    if "layer_types" not in architecture.honours and kinds not in (None, ["full_attention"] * num_layers):
        hf.refuse(f"layer_types: expected full_attention for every layer ({num_layers}), got {kinds!r}")
    hidden, heads = hf.size("hidden_size"), hf.size("num_attention_heads")
    divides = hf["head_dim"] is not None or hidden % heads == 0
    hf.refuse_if(not divides, f"hidden_size {hidden} without head_dim, over {heads} heads")
    head_dim = hf.size("head_dim", hidden // heads, most=MOST_HEAD_DIM)
    hf.refuse_if(head_dim % 2, f"an odd head_dim, {head_dim},")
    eos = hf.token_ids("eos_token_id", hf["eos_token_id"])
    if "eos_token_id" in generation:
        in_generation = ConfigJson(generation, {}, str(Path(origin).with_name("generation_config.json")))
        eos = in_generation.token_ids("eos_token_id", generation["eos_token_id"])
    rope = read_rope(hf, "partial_rotary_factor" in architecture.honours)
    fields = {
        "architecture": architecture.name,
        "vocab_size": hf.size("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": hf.size("intermediate_size"),
        "num_layers": num_layers,
        "num_heads": heads,
        "num_kv_heads": hf.size("num_key_value_heads", heads),
        "head_dim": head_dim,
        "rms_norm_eps": hf.share("rms_norm_eps"),
        "rope": rope,
        "max_model_tokens": max(hf.size("max_position_embeddings"), rope.stretched_positions),
        "tie_word_embeddings": hf.flag("tie_word_embeddings"),
        "dtype": hf.agreed("dtype", "torch_dtype") or "float32",  # what transformers assumes
        "quantization": quantization,
        "eos_token_ids": eos,
    }
    return convert(fields | architecture.fields(hf), ModelConfig, origin)


def _architecture(given: Mapping[str, Any], origin: str) -> Architecture:
    names, known = given.get("architectures"), {a.hf_class: a for a in ARCHITECTURES.values()}
    if names is None:
        raise ConfigError(f"{origin}: key 'architectures' is missing")
    if isinstance(names, list) and names and names[0] in list(MISSING):
        raise ConfigError(f"{origin}: architectures: {names[0]} is not supported: {MISSING[names[0]]}")
    if not isinstance(names, list) or not names or names[0] not in list(known):
        raise ConfigError(f"{origin}: architectures: expected one of {', '.join(known)}, got {names!r}")
    return known[names[0]]
