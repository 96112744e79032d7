"""Hosts agree if code, torch, processor and the model's files are the same on each: else ranks compute other numbers.

Every rank samples for itself, so one that is a bit off may draw another token than the others, and then another text.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from hashlib import blake2b
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from nanoflow_backend.config.engine_config import EngineConfig, SettledConfig
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.model_folder import file_digest, what_is_wrong
from nanoflow_backend.process.child import PACKAGES

MODEL_FILES = ("config.json", "*.safetensors")
OF_MODEL = "the model's "  # begins the name of a fact about a file
DIGEST_BYTES = 6  # against accidents


def find_facts(config: SettledConfig) -> dict[str, str]:
    """What is to be the same on every host that runs `config`, by name, as it is on this one, the leader.

    Raises: ConfigError, a file of the model cannot be read.
    """
    model = Path(config.model)
    patterns = MODEL_FILES[:1] if config.load_format == "dummy" else MODEL_FILES
    files = sorted({path.name for pattern in patterns for path in model.glob(pattern)})
    names = ["nanoflow", "torch", *(OF_MODEL + file for file in files)]
    if config.device == "cpu":
        names.append("processor")
    return {name: _find(name, model) for name in names}


def find_differences(leader: Mapping[str, str], model: Path) -> list[str]:
    """What the leader has otherwise than this host, with its own folder of the model, each in a few words for people.

    Raises: ConfigError, there is no such model, or a file cannot be read.
    """
    if wrong := what_is_wrong(model):
        raise ConfigError(wrong)
    here = {name: _find(name, model) for name in leader}
    differing = [name for name in leader if leader[name] != here[name]]
    return [f"{name}: the leader has {leader[name]}, this host {here[name]}" for name in differing]


def find_unexpected(leader: SettledConfig, wanted: Mapping[str, str]) -> list[str]:
    """Fields of engine.json that the leader's configuration has otherwise than this host wants them.

    Raises: ConfigError, an unknown field, or a value that it cannot have.
    """
    if not wanted:
        return []
    fields = {name: getattr(leader, name) for name in leader.__struct_fields__}
    here = EngineConfig.resolve({**fields, **wanted}, relative_to=Path.cwd(), origin="--set")
    return [
        f"{name}: the leader has {getattr(leader, name)!r}, this host wants {getattr(here, name)!r}"
        for name in wanted
        if getattr(leader, name) != getattr(here, name)
    ]


def _find(name: str, model: Path) -> str:
    if name.startswith(OF_MODEL):
        path = model / Path(name.removeprefix(OF_MODEL)).name
        try:
            return file_digest(path) if path.exists() else "none"
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from None
    if name == "processor":
        return _processor()
    return f"{_version('nanoflow-triton')}, code {_code_digest()}" if name == "nanoflow" else _version(name)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _code_digest() -> str:
    """Of the sources that run here."""
    digest = blake2b(digest_size=DIGEST_BYTES)
    for package in PACKAGES:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            continue
        folder = Path(spec.origin).parent
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _processor() -> str:
    """As Linux names it: kernels, and so the last bit of a sum, are chosen by it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
