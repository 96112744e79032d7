"""MadeWith is what all results of one output have in common: the model's files and the settings they depend on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from nanoflow_backend.config.engine_config import SettledConfig
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.model_folder import file_digest

VERSION = 1
# Others change how fast results come.
SETTINGS = ("dtype", "quantization", "kv_cache_dtype", "load_format", "max_model_tokens", "seed")
MODEL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "*.safetensors",
)  # fmt: skip


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


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
