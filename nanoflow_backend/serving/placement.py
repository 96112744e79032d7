"""Placement: the GPUs of each instance of a model. One instance is one engine; the server spreads requests over them.

`gpu_device_ids` in config.pbtxt gives each instance its group, as in the TensorRT-LLM backend: "0;1;2;3" are four
engines, "0,1;2,3" two with tensor_parallel 2. Without it an instance of KIND_GPU takes the GPU that the server chose,
and any other sees them all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from nanoflow_backend.config import ConfigError, EngineConfig

GPU_DEVICE_IDS = "gpu_device_ids"
VISIBLE = "CUDA_VISIBLE_DEVICES"


def place(
    config: EngineConfig, args: Mapping[str, str], model_config: Mapping[str, Any], environment: Mapping[str, str]
) -> tuple[EngineConfig, dict[str, str]]:
    """The engine's configuration, and what to add to its environment.

    Args:
        args: what the server says to `initialize`.
        environment: the server's: ids count among the GPUs that are visible there.

    Raises:
        ConfigError: groups that are not GPUs, do not fit the instances or tensor_parallel, or have a GPU twice.
    """
    entry = model_config.get("parameters", {}).get(GPU_DEVICE_IDS)
    if entry is not None:
        ids = _group(entry["string_value"], args["model_instance_name"], model_config["instance_group"])
    elif args["model_instance_kind"] == "GPU":
        ids = [int(args["model_instance_device_id"])]
    else:
        return config, {}
    if config.device == "cpu":
        raise ConfigError(f"device: expected cuda or auto, got cpu: this instance has the GPUs {ids}")
    if len(ids) != config.tensor_parallel:
        raise ConfigError(f"tensor_parallel: expected {len(ids)}, for this instance has the GPUs {ids}")
    return msgspec.structs.replace(config, device="cuda"), {VISIBLE: _visible(ids, environment.get(VISIBLE))}


def _group(groups_text: str, instance_name: str, instance_groups: list[Mapping[str, Any]]) -> list[int]:
    if not re.fullmatch(r"\d+(,\d+)*(;\d+(,\d+)*)*", groups_text):
        raise ConfigError(f'{GPU_DEVICE_IDS}: expected groups of GPU ids as in "0;1" or "0,1;2,3", got {groups_text!r}')
    groups = [[int(gpu) for gpu in group.split(",")] for group in groups_text.split(";")]
    gpus = [gpu for group in groups for gpu in group]
    if len(set(gpus)) != len(gpus):
        raise ConfigError(f"{GPU_DEVICE_IDS}: expected each GPU once, got {groups_text!r}")
    if any(group["kind"] == "KIND_GPU" for group in instance_groups):
        raise ConfigError(f"{GPU_DEVICE_IDS}: expected instances of KIND_MODEL, KIND_GPU lets the server choose a GPU")
    # As the server names them, and in this order.
    names = [f"{group['name']}_{index}" for group in instance_groups for index in range(group["count"])]
    if len(names) != len(groups):
        raise ConfigError(f"{GPU_DEVICE_IDS}: expected {len(names)} groups, one for each instance, got {groups_text!r}")
    return groups[names.index(instance_name)]


def _visible(ids: list[int], visible: str | None) -> str:
    """The value of CUDA_VISIBLE_DEVICES that shows only these out of the visible ones."""
    if not visible:
        return ",".join(map(str, ids))
    names = visible.split(",")
    if max(ids) >= len(names):
        raise ConfigError(f"{GPU_DEVICE_IDS}: expected ids below {len(names)}, for {VISIBLE} is {visible}, got {ids}")
    return ",".join(names[gpu] for gpu in ids)
