"""MadeWith is what all results of one output have in common: the model's files and the settings they depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from nanoflow_backend.config.engine_config import SettledConfig
from nanoflow_backend.config.error import ConfigError

VERSION = 1
# Others change how fast results come.
SETTINGS = ("dtype", "quantization", "kv_cache_dtype", "load_format", "max_model_tokens", "seed")
MODEL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "*.safetensors",
)  # fmt: skip
SPANS, SPAN_BYTES = 16, 2**16  # of a file, read for its digest: a minute's work on 100 GB would be too much


class MadeWith(msgspec.Struct, frozen=True):
    """The first line of a record; `model` has a digest for each file of the model's folder."""

    nanoflow_batch: int  # the version of the record's format
    settings: dict[str, Any]
    model: dict[str, str]

    @classmethod
    def of(cls, config: SettledConfig) -> MadeWith:
        """Raises: ConfigError, where a file of the model cannot be read."""
        folder = Path(config.model)
        files = sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern)})
        try:
            model = {path.name: file_digest(path) for path in files}
        except OSError as error:
            raise ConfigError(f"{error.filename}: {error.strerror}") from None
        return cls(VERSION, {name: getattr(config, name) for name in SETTINGS}, model)

    def changes_from(self, before: MadeWith) -> list[str]:
        """What is no longer as it was, each in a few words for people."""
        settings = [
            f"{name} was {before.settings.get(name)!r}, is {self.settings.get(name)!r}"
            for name in _differing(before.settings, self.settings)
        ]
        return settings + [f"the model's {name} has changed" for name in _differing(before.model, self.model)]


def file_digest(path: Path) -> str:
    """A digest of a file's size and content; of a large one, of its first bytes and spans spread evenly over it.

    The first bytes of a safetensors file name its tensors; training moves nearly every weight, so the spans show it.
    """
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as file:
        if size <= SPANS * SPAN_BYTES:
            digest.update(file.read())
        else:
            for span in range(SPANS):
                file.seek(span * (size - SPAN_BYTES) // (SPANS - 1))
                digest.update(file.read(SPAN_BYTES))
    return digest.hexdigest()


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
