"""Every measured result begins with this header: what ran where, with which versions, by which command."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.runtime.gpu_meter import find_gpu_meter

if TYPE_CHECKING:
    from nanoflow_backend.engine import Engine

PROGRAMS = {"nanoflow_backend": "nanoflow", "nanoflow_search": "nanoflow-search"}  # their packages, run with -m
PACKAGES = ("torch", "triton", "numpy", "tokenizers", "tritonclient", "nvidia-pytriton", "vllm")


def header() -> dict[str, Any]:
    """Return what every result begins with: command, date, device and versions."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    meter = find_gpu_meter()
    host = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    return {
        "command": f"{_program()} {shlex.join(map(_without_folder, sys.argv[1:]))}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": host,  # what runs on a GPU says so instead
        "host": host,
        **({"gpu": meter.name, "gpu_power_limit_w": meter.power_limit_w} if meter else {}),
        "versions": versions,
    }


def engine_facts(engine: Engine) -> dict[str, Any]:
    """Which engine a result is of; its settings as they were on this device."""
    config, quantization = engine.config, engine.model_config.quantization
    settings = {name: getattr(config, name) for name in config.__struct_fields__}
    return {
        **({"device": engine.executor.device.name} if config.device == "cuda" else {}),
        "model": Path(config.model).name,
        "engine": "nanoflow",
        "engine_is": engine.description.replace(config.schedule, _without_folder(config.schedule)),
        "schedule": _without_folder(config.schedule),
        "quantization": quantization
        and {
            "method": quantization.method,
            "weights": quantization.weights,
            "activations": quantization.activations,
        },
        "kv_cache_dtype": config.kv_cache_dtype,
        "settings": without_folders(settings),
    }


def labelled(title: str, measured: Mapping[str, Any]) -> str:
    """The title of a result as people read it: with a second line, if it is of a rank that ran alone."""
    emulated = measured.get("emulated")
    if not emulated:
        return title
    return f"{title}\nEMULATED: rank 0 of {emulated['ranks']} alone, network {emulated['network']}"


def _program() -> str:
    path = Path(sys.argv[0])
    package = path.parent.name
    return PROGRAMS.get(package, f"python -m {package}") if path.name == "__main__.py" else path.name


def without_folders(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a result shows them."""

    def shown(value: Any) -> Any:
        if isinstance(value, msgspec.Struct):
            return without_folders(msgspec.structs.asdict(value))
        return _without_folder(value) if isinstance(value, str) else value

    return {name: shown(value) for name, value in settings.items()}


def _without_folder(word: str) -> str:
    """Where a file lies on this machine is nobody's business; paths inside the project stay."""
    before, equals, path = word.rpartition("=")
    if path.startswith("{"):
        return before + equals + re.sub(r'"(/[^"]*)"', lambda found: f'"{Path(found[1]).name}"', path)
    return before + equals + (Path(path).name if os.path.isabs(path) else path)


def write(result: dict[str, Any], output: Path | None) -> None:
    """To a file, or to standard output.

    Raises:
        ConfigError: the file cannot be written; then the result is on standard output.
    """
    text = msgspec.json.format(msgspec.json.encode({**header(), **result}), indent=2).decode()
    if output is None:
        print(text)
        return
    try:
        output.write_text(text + "\n")
    except OSError as error:
        print(text)
        raise ConfigError(f"{output}: {error.strerror}; the result is on the standard output") from None
