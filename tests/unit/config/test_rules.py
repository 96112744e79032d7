"""Rules of single values, at their bounds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nanoflow_backend.config.rules import broken, is_file_name, is_path, one_of, whole


@pytest.mark.parametrize("name", ["a" * 255, "a" * 256, "ä" * 127, "ä" * 128, "a\0b", "/".join(["a"] * 2048)])
def test_a_path_is_what_the_system_takes(name: str, tmp_path: Path) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        os.stat(name, dir_fd=folder)
        taken = True
    except FileNotFoundError:
        taken = True
    except (OSError, ValueError):
        taken = False
    finally:
        os.close(folder)
    assert is_path(name) is taken


def test_a_file_name_is_no_path_to_another_folder() -> None:
    assert is_file_name("model-00001-of-00002.safetensors")
    assert not any(map(is_file_name, ("", ".", "..", "/etc/passwd", "../a", "a/", "a\0", "a" * 256)))


def test_what_breaks_a_rule_is_named_with_what_was_expected() -> None:
    rules = {"a": whole(1, 10), "b": one_of(1, 2, 4), "c": whole(0, or_null=True), "absent": whole(1)}
    assert broken(rules, {"a": 9, "b": 4, "c": None}) == []
    assert broken(rules, {"a": 10, "b": 3, "c": -1}) == [
        "a: expected an integer >= 1, below 10, got 10",
        "b: expected 1, 2 or 4, got 3",
        "c: expected an integer >= 0 or null, below 2147483648, got -1",
    ]
