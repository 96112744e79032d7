"""read_rope reads the rotary embedding that a config.json describes, in either of its spellings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.file import convert
from nanoflow_backend.config.model_config import RopeConfig
from nanoflow_backend.models.config_json import ConfigJson, agreed

SETTINGS = ("rope_theta", "rope_type", "type", "partial_rotary_factor")  # that every scaling may have
SCALINGS: dict[str, tuple[str, ...]] = {  # each with the keys that it cannot do without
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_rope(hf: ConfigJson) -> RopeConfig:
    """`rope_parameters` since transformers 5; before, `rope_theta` beside `rope_scaling` (whose `type` was renamed).

    Raises:
        ConfigError: they say different things, or what this engine does not compute.
    """
    objects = {name: hf[name] for name in ("rope_parameters", "rope_scaling") if hf[name]}
    for name, value in objects.items():
        if not isinstance(value, dict):
            hf.refuse(f"{name}: expected an object or null, got {value!r}")
        if kinds := [key for key, inner in value.items() if isinstance(inner, dict)]:
            hf.refuse(
                f"{name} with an object for each kind of layer ({', '.join(kinds)}) is not supported; expected one "
                "for all layers"
            )
    everywhere = {**hf.given, **{f"{name}.{key}": value for name in objects for key, value in objects[name].items()}}

    def setting(key: str) -> Any:
        return agreed(everywhere, (*(f"{name}.{key}" for name in objects), key), hf.origin)

    rotated = setting("partial_rotary_factor")
    hf.refuse_if(rotated not in (None, 1), f"partial_rotary_factor {rotated}")
    theta = setting("rope_theta")
    theta = hf["rope_theta"] if theta is None else theta
    readings = [_read_scaling(scaling, theta, name, hf.origin) for name, scaling in objects.items()]
    if len(set(readings)) > 1:
        hf.refuse(
            f"rope_parameters {objects['rope_parameters']} and rope_scaling {objects['rope_scaling']} say two things: "
            "keep one (the scaling belongs into rope_parameters since transformers 5)"
        )
    return readings[0] if readings else convert({"theta": theta}, RopeConfig, f"{hf.origin}: rope")


def _read_scaling(scaling: Mapping[str, Any], theta: Any, name: str, origin: str) -> RopeConfig:
    kind = agreed(scaling, ("rope_type", "type"), f"{origin}: {name}") or "default"
    if kind not in list(SCALINGS):
        raise ConfigError(f"{origin}: rope scaling {kind!r} is not supported ({', '.join(SCALINGS)} are)")
    for key in SCALINGS[kind]:
        if scaling.get(key) is None:
            raise ConfigError(f"{origin}: rope scaling {kind!r}: key {key!r} is missing")
    known = (*SETTINGS, *SCALINGS[kind])
    if unknown := [key for key, value in scaling.items() if value is not None and key not in known]:
        raise ConfigError(
            f"{origin}: {name}: rope scaling {kind!r} has no key {unknown[0]!r}; expected {', '.join(known)}"
        )
    renamed = {"original_max_position_embeddings": "original_max_positions"}
    fields = {renamed.get(key, key): scaling[key] for key in SCALINGS[kind]}
    return convert({"theta": theta, "scaling": kind, **fields}, RopeConfig, f"{origin}: rope")
