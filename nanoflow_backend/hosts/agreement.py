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

OF_MODEL = ("config.json", "*.safetensors")
DIGEST_BYTES = 6  # against accidents


def find_facts(config: SettledConfig, model: Path) -> dict[str, str]:
    """What is to be the same on every host that runs `config`, as it is on this one, with its own folder of the model.

    Raises: ConfigError, there is no such model, or a file cannot be read.
    """
    if wrong := what_is_wrong(model):
        raise ConfigError(wrong)
    facts = {"nanoflow": f"{_version('nanoflow-triton')}, code {_code_digest()}", "torch": _version("torch")}
    if config.device == "cpu":
        facts["processor"] = _processor()
    patterns = OF_MODEL[:1] if config.load_format == "dummy" else OF_MODEL
    try:
        for path in sorted({path for pattern in patterns for path in model.glob(pattern)}):
            facts[f"the model's {path.name}"] = file_digest(path)
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from None
    return facts


def find_differences(leader: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """What is not the same, each in a few words for people."""
    names = sorted(name for name in leader.keys() | here.keys() if leader.get(name) != here.get(name))
    return [f"{name}: the leader has {leader.get(name, 'none')}, this host {here.get(name, 'none')}" for name in names]


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
