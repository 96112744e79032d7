"""place gives each instance of a model its GPUs and ports. One instance is one engine; the server spreads requests.

`gpu_device_ids` in config.pbtxt gives each instance its group, as in the TensorRT-LLM backend: "0;1;2;3" are four
engines, "0,1;2,3" two with tensor_parallel 2. `GPU_DEVICE_IDS` is the vLLM backend's: one group, for all instances of
KIND_MODEL. Without them an instance of KIND_GPU takes the GPU that the server chose, any other what engine.json says.
Where instances publish KV events, they count from `data_parallel_rank` on, in the order of the instance groups.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.error import ConfigError

GPU_DEVICE_IDS = "gpu_device_ids"
VLLM_GPU_DEVICE_IDS = "GPU_DEVICE_IDS"


def place(config: EngineConfig, args: Mapping[str, str], model_config: Mapping[str, Any]) -> EngineConfig:
    """The configuration of one instance's engine; `args` are what the server says to `initialize`.

    Raises:
        ConfigError: groups that are not GPUs, do not fit the instances or tensor_parallel, or have a GPU twice.
    """
    if config.kv_events is not None:
        rank = config.kv_events.data_parallel_rank + _index(args, model_config["instance_group"])
        config = replace(config, kv_events=replace(config.kv_events, data_parallel_rank=rank))
    gpus = _gpus(args, model_config)
    if gpus is None:
        return config
    if config.gpus is not None:
        raise ConfigError(f"gpus: expected none in engine.json, for the server places this instance on {list(gpus)}")
    return replace(config, gpus=gpus)


def engine_parameters(model_config: Mapping[str, Any]) -> dict[str, str]:
    """The other `parameters` of config.pbtxt; those in capitals (EXECUTION_ENV_PATH, ...) are the Python backend's."""
    entries = model_config.get("parameters", {}).items()
    return {name: entry["string_value"] for name, entry in entries if not name.isupper() and name != GPU_DEVICE_IDS}


def _gpus(args: Mapping[str, str], model_config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """None: those that engine.json says."""
    parameters = model_config.get("parameters", {})
    entry, shared = parameters.get(GPU_DEVICE_IDS), parameters.get(VLLM_GPU_DEVICE_IDS)
    if entry is not None and shared is not None:
        raise ConfigError(f"{GPU_DEVICE_IDS}: expected it without {VLLM_GPU_DEVICE_IDS}, got both")
    if entry is not None:
        return _group(entry["string_value"], args, model_config["instance_group"])
    if args["model_instance_kind"] == "GPU":
        return (int(args["model_instance_device_id"]),)
    return None if shared is None else _shared_group(shared["string_value"])


def _instances(instance_groups: list[Mapping[str, Any]]) -> list[tuple[str, str | None]]:
    """Name and GPU of each instance, as the server names them, and in its order. GPU None: not the server's matter."""
    return [
        (f"{group['name']}_{index}", None if gpu is None else str(gpu))
        for group in instance_groups
        for index in range(group["count"])
        for gpu in (group["gpus"] if group["kind"] == "KIND_GPU" else [None])
    ]


def _index(args: Mapping[str, str], instance_groups: list[Mapping[str, Any]]) -> int:
    """Of an instance among all of its model."""
    gpu = args["model_instance_device_id"] if args["model_instance_kind"] == "GPU" else None
    return _instances(instance_groups).index((args["model_instance_name"], gpu))


def _shared_group(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r" *\d+ *(, *\d+ *)*", text, re.ASCII):
        raise ConfigError(f'{VLLM_GPU_DEVICE_IDS}: expected GPU ids as in "0,1", got {text!r}')
    return tuple(int(gpu) for gpu in text.split(","))


def _group(text: str, args: Mapping[str, str], instance_groups: list[Mapping[str, Any]]) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(,\d+)*(;\d+(,\d+)*)*", text):
        raise ConfigError(f'{GPU_DEVICE_IDS}: expected groups of GPU ids as in "0;1" or "0,1;2,3", got {text!r}')
    groups = [tuple(int(gpu) for gpu in group.split(",")) for group in text.split(";")]
    if len({gpu for group in groups for gpu in group}) < sum(map(len, groups)):
        raise ConfigError(f"{GPU_DEVICE_IDS}: expected each GPU once, got {text!r}")
    if any(group["kind"] == "KIND_GPU" for group in instance_groups):
        raise ConfigError(f"{GPU_DEVICE_IDS}: expected instances of KIND_MODEL; with KIND_GPU the server chooses")
    instances = len(_instances(instance_groups))
    if instances != len(groups):
        raise ConfigError(f"{GPU_DEVICE_IDS}: expected {instances} groups, one for each instance, got {text!r}")
    return groups[_index(args, instance_groups)]
