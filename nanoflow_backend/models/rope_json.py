"""read_rope reads the rotary embedding that a config.json describes, in either of its spellings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.file import convert
from nanoflow_backend.config.model_config import RopeConfig
from nanoflow_backend.config.rules import INT32_END
from nanoflow_backend.models.config_json import ConfigJson, agreed

FIRST_CONTEXT = "original_max_position_embeddings"
RENAMED = {FIRST_CONTEXT: "original_max_positions"}
FORMER = {"su": "longrope"}  # what Phi-3's first files call it
SETTINGS = ("rope_theta", "rope_type", "type", "partial_rotary_factor")  # that every scaling may have


class Keys(NamedTuple):
    """Of one scaling: those that it cannot do without, and others."""

    needed: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


SCALINGS: dict[str, Keys] = {
    "default": Keys(),
    "linear": Keys(("factor",)),
    "llama3": Keys(("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")),
    "yarn": Keys(
        ("factor",),
        (
            "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate",
            "mscale", "mscale_all_dim",
        ),
    ),
    "longrope": Keys(("short_factor", "long_factor"), ("factor", "attention_factor", FIRST_CONTEXT)),
    "dynamic": Keys(("factor",)),
}  # fmt: skip


def read_rope(hf: ConfigJson, may_be_partial: bool = False) -> RopeConfig:
    """`rope_parameters` since transformers 5; before, `rope_theta` beside `rope_scaling` (whose `type` was renamed).

    Args:
        may_be_partial: whether the class rotates a part of each head where the file says so.

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
    hf.refuse_if(rotated not in (None, 1) and not may_be_partial, f"partial_rotary_factor {rotated} of this class")
    theta = setting("rope_theta")
    common = {
        "theta": hf["rope_theta"] if theta is None else theta,
        "partial_rotary_factor": (hf["partial_rotary_factor"] or 1) if rotated is None else rotated,
    }
    readings = [_read_scaling(scaling, common, name, hf) for name, scaling in objects.items()]
    if len(set(readings)) > 1:
        hf.refuse(
            f"rope_parameters {objects['rope_parameters']} and rope_scaling {objects['rope_scaling']} say two things: "
            "keep one (the scaling belongs into rope_parameters since transformers 5)"
        )
    return readings[0] if readings else convert(common, RopeConfig, f"{hf.origin}: rope")


def _read_scaling(scaling: Mapping[str, Any], common: Mapping[str, Any], name: str, hf: ConfigJson) -> RopeConfig:
    where = f"{hf.origin}: {name}"
    kind = agreed(scaling, ("rope_type", "type"), where) or "default"
    kind = FORMER.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in list(SCALINGS):
        hf.refuse(f"rope scaling {kind!r} is not supported ({', '.join(SCALINGS)} are)")
    keys = SCALINGS[kind]
    for key in keys.needed:
        if scaling.get(key) is None:
            hf.refuse(f"rope scaling {kind!r}: key {key!r} is missing")
    known = (*SETTINGS, *keys.needed, *keys.optional)
    given = {key: value for key, value in scaling.items() if value is not None and key not in SETTINGS}
    if unknown := [key for key in given if key not in known]:
        hf.refuse(f"{name}: rope scaling {kind!r} has no key {unknown[0]!r}; expected {', '.join(known)}")
    if kind == "yarn":
        given = {FIRST_CONTEXT: hf.size("max_position_embeddings"), **given}
        given = _with_attention_factor(given, where)
    if kind == "longrope":
        given = _with_first_context(given, name, hf)
    fields = {RENAMED.get(key, key): value for key, value in given.items()}
    return convert({**common, "scaling": kind, **fields}, RopeConfig, f"{hf.origin}: rope")


def _with_first_context(given: dict[str, Any], name: str, hf: ConfigJson) -> dict[str, Any]:
    """Longrope's settings with the first context, which Phi-3's files have beside them, and `attention_factor`: where
    that is left out it follows from how much longer `max_position_embeddings` is, or from `factor`.

    Raises:
        ConfigError: the file, or the class where it is silent, says another first context; or it is too short.
    """
    said = {FIRST_CONTEXT: hf[FIRST_CONTEXT], f"{name}.{FIRST_CONTEXT}": given.get(FIRST_CONTEXT)}
    first = agreed(said, tuple(said), hf.origin)
    positions = hf.size("max_position_embeddings")
    first = hf.integer(FIRST_CONTEXT, positions if first is None else first, 2, INT32_END - 1)
    factor = given.get("factor", positions / first)
    if type(factor) not in (int, float) or not factor > 0:
        hf.refuse(f"{name}: factor: expected a number > 0, got {factor!r}")
    follows = math.sqrt(1 + math.log(factor) / math.log(first)) if factor > 1 else 1.0
    return {"attention_factor": follows, **given, FIRST_CONTEXT: first}


def _with_attention_factor(given: dict[str, Any], where: str) -> dict[str, Any]:
    """Yarn's settings with `attention_factor`: where that is left out it follows from `factor`, and from `mscale` and
    `mscale_all_dim` where both are given. None of them may be 0: transformers takes 0 for absent.

    Raises:
        ConfigError: one of them is no number > 0.
    """
    numbers = {key: given.get(key, 1) for key in ("factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow")}
    for key, value in numbers.items():
        if type(value) not in (int, float) or not value > 0:
            raise ConfigError(f"{where}: {key}: expected a number > 0, got {value!r}")
    rest = {key: value for key, value in given.items() if key not in ("mscale", "mscale_all_dim")}
    if "attention_factor" in given:
        return rest

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(max(numbers["factor"], 1)) + 1

    has_both = "mscale" in given and "mscale_all_dim" in given
    over = magnitude(numbers["mscale_all_dim"]) if has_both else 1.0
    return {**rest, "attention_factor": magnitude(numbers["mscale"] if has_both else 1) / over}
