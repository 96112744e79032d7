"""Files of settings are read whole and checked: JSON objects, and the structs that are made of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import msgspec

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.rules import Rule, broken
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
    return parse_json(read_file(path), str(path))


def parse_json(text: bytes | str, origin: str) -> dict[str, Any]:
    """The JSON object that a text is.

    Raises:
        ConfigError: `origin`, and why it is none.
    """
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.ValidationError as error:
        raise ConfigError(f"{origin}: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{origin}: not valid JSON: {error}") from None


def convert(
    fields: Mapping[str, Any], kind: type[T], origin: str, strict: bool = True, rules: Mapping[str, Rule] | None = None
) -> T:
    """The struct `kind` made of `fields`; strings stand for numbers unless `strict`.

    Args:
        rules: what `kind` itself checks, so that it is told beside fields of a wrong type.

    Raises:
        ConfigError: `origin`, and every field that is not what it should be.
    """
    try:
        return msgspec.convert(fields, kind, strict=strict)
    except msgspec.ValidationError as error:
        faults = [str(error.__cause__)] if error.__cause__ else _faults(fields, kind, strict, rules or {})
        faults = faults or [str(error)]
        count = f"{len(faults)} faults: " if len(faults) > 1 else ""
        raise ConfigError(f"{origin}: {count}{'; '.join(faults)}") from None


def _faults(fields: Mapping[str, Any], kind: Any, strict: bool, rules: Mapping[str, Rule]) -> list[str]:
    """What is wrong with each field by itself: msgspec stops at the first."""
    faults, values = [], {}
    known = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    for name, field in known.items():
        try:
            if name in fields:
                values[name] = msgspec.convert(fields[name], field.type, strict=strict)
            elif field.required:
                faults.append(f"Object missing required field `{name}`")
        except msgspec.ValidationError as error:
            inner = str(error).partition(" - at `$")
            choices = _choices(field.type) if inner[0].startswith("Invalid enum value") else []
            expected = f": expected {', '.join(map(str, choices))}" if choices else ""
            faults.append(f"{inner[0]} - at `$.{name}{inner[2] or '`'}{expected}")
    unknown = [f"`{name}`" for name in fields if name not in known]
    if unknown and kind.__struct_config__.forbid_unknown_fields:
        several = "s" if len(unknown) > 1 else ""
        faults.append(f"Object contains unknown field{several} {', '.join(unknown)}; known are {', '.join(known)}")
    return faults + broken(rules, values)


def _choices(kind: Any) -> list[Any]:
    """The values that the Literals of a type have, be they optional or items."""
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return [value for part in get_args(kind) for value in _choices(part)]
