"""A Rule says what a value of a settings file may be, beyond its type; a struct's values are checked all together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

INT32_END = 2**31
NAME_BYTES, PATH_BYTES = 255, 4095  # what Linux takes


class Rule(NamedTuple):
    """A value for which `holds` is false is answered with what was `expected`. None is no value: types allow it."""

    expected: str
    holds: Callable[[Any], bool]


def whole(least: int, end: int = INT32_END, or_null: bool = False) -> Rule:
    """An integer in least .. end - 1."""
    null = " or null" if or_null else ""
    return Rule(f"an integer >= {least}{null}, below {end}", lambda value: least <= value < end)


def one_of(*values: object) -> Rule:
    """One of a few values."""
    return Rule(f"{', '.join(map(str, values[:-1]))} or {values[-1]}", lambda value: value in values)


def is_path(value: str) -> bool:
    """A path that a file could have."""
    path = value.encode(errors="replace")
    return b"\0" not in path and len(path) <= PATH_BYTES and max(map(len, path.split(b"/"))) <= NAME_BYTES


def is_file_name(value: str) -> bool:
    """The name of a file in a folder, and no path to another one."""
    return value not in ("", ".", "..") and "/" not in value and is_path(value)


def split_address(value: str) -> tuple[str, int] | None:
    """(host, port) of HOST:PORT, where the host may be an IPv6 address in brackets; None: it is none."""
    host, colon, port = value.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        return None
    is_port = port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 2**16
    return (host, int(port)) if colon and host and is_port else None


PATH = Rule(f"a path of names up to {NAME_BYTES} bytes, {PATH_BYTES} in all, without NUL", is_path)


def broken(rules: Mapping[str, Rule], values: Mapping[str, Any]) -> list[str]:
    """What is wrong with `values`, by `rules` of the same names."""
    return [
        f"{name}: expected {rule.expected}, got {values[name]!r}"
        for name, rule in rules.items()
        if values.get(name) is not None and not rule.holds(values[name])
    ]
