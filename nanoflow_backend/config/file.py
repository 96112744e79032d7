"""Files of settings are read whole and checked: JSON objects, and the structs that are made of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.model_folder import is_lfs_pointer, lfs_hint

MOST_FILE_BYTES = 256 * 2**20  # of JSON; the largest tokenizer.json of today has some 35 MB

T = TypeVar("T")


def read_file(path: Path, most_bytes: int = MOST_FILE_BYTES) -> bytes:
    """A whole file of a model's folder. It may be a link, as in a cache of downloads.

    Raises:
        ConfigError: it cannot be read, is no file (a pipe would keep us waiting), or larger than any such file is.
    """
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path}: expected a file, got something else")
        if (size := path.stat().st_size) > most_bytes:
            raise ConfigError(f"{path}: expected at most {most_bytes} bytes, got {size}")
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    if is_lfs_pointer(content):
        raise ConfigError(lfs_hint(path))
    return content


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        return msgspec.json.decode(read_file(path), type=dict[str, Any])
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None


def convert(fields: Mapping[str, Any], kind: type[T], origin: str, strict: bool = True) -> T:
    """The struct `kind` made of `fields`; strings stand for numbers unless `strict`.

    Raises:
        ConfigError: `origin`, and the field that is not what it should be.
    """
    try:
        return msgspec.convert(fields, kind, strict=strict)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{origin}: {error.__cause__ or error}") from None
