"""--set FIELD=VALUE of the command line."""

from __future__ import annotations

import pytest

from nanoflow_backend.commands.settings import parse
from nanoflow_backend.config.error import ConfigError


def test_values_are_texts_objects_and_lists() -> None:
    assert parse(["gpus=[1, 0]", 'disk_kv_cache={"path": "p"}', "leader_address=[::1]:29400", "dtype=float32"]) == {
        "gpus": [1, 0],
        "disk_kv_cache": {"path": "p"},
        "leader_address": "[::1]:29400",
        "dtype": "float32",
    }


@pytest.mark.parametrize("setting", ["gpus=[1, x]", "disk_kv_cache={path"])
def test_what_begins_as_json_is_some(setting: str) -> None:
    with pytest.raises(ConfigError, match=r"^--set .*: expected JSON: JSON is malformed"):
        parse([setting])
