"""The folder of a version in a model repository has an engine.json, or the model.json of Triton's vLLM backend."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanoflow_backend.config import vllm_args
from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.file import read_json
from nanoflow_backend.model_folder import what_is_wrong

OWN_FILE, VLLM_FILE = "engine.json", "model.json"


def settings_file(folder: Path) -> Path:
    """The file that counts: engine.json, or model.json where there is only that."""
    own, vllm = folder / OWN_FILE, folder / VLLM_FILE
    return vllm if vllm.exists() and not own.exists() else own


def load(folder: Path, parameters: Mapping[str, Any]) -> EngineConfig:
    """Read engine.json, or model.json where there is none; `parameters` of config.pbtxt win over either.

    Raises:
        ConfigError: naming the file, the key and what was expected; or the model's folder, and what is wrong with it.
    """
    path = settings_file(folder)
    config = EngineConfig.load(path, parameters) if path.name == OWN_FILE else _translated(path, parameters)
    if not Path(config.model).exists():
        wrong = what_is_wrong(Path(config.model))
        raise ConfigError(f"{path}: model (a relative path starts at this file's folder): {wrong}")
    return config


def _translated(path: Path, parameters: Mapping[str, Any]) -> EngineConfig:
    fields = vllm_args.engine_fields(read_json(path), path.parent, str(path))
    try:
        return EngineConfig.resolve({**fields, **parameters}, relative_to=path.parent, origin=str(path))
    except ConfigError as error:
        raise ConfigError(vllm_args.spoken(str(error))) from None
