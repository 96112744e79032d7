"""Ministral is Mistral with its window in some layers, where config.json says in which."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nanoflow_backend.models.blocks import attention_kinds
from nanoflow_backend.models.config_json import ConfigJson
from nanoflow_backend.models.families.mistral import MISTRAL


def config_fields(hf: ConfigJson) -> dict[str, Any]:
    """All layers have the window, if it is not null, unless `layer_types` says which."""
    return attention_kinds.window_fields(hf, lambda layer: True)


MINISTRAL = replace(
    MISTRAL,
    name="ministral",
    hf_class="MinistralForCausalLM",
    fields=config_fields,
    honours=("layer_types",),
)
