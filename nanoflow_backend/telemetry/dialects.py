"""A dialect is a set of names under which others look for an engine's metrics; a model's page may have several."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from nanoflow_backend.config import version_folder
from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.file import read_json
from nanoflow_backend.telemetry.families import FAMILIES
from nanoflow_backend.telemetry.family import Family
from nanoflow_backend.telemetry.trtllm_families import TRTLLM_FAMILIES
from nanoflow_backend.telemetry.vllm_families import VLLM_FAMILIES

DIALECTS = {"nanoflow": FAMILIES, "vllm": VLLM_FAMILIES, "trtllm": TRTLLM_FAMILIES}
PARAMETER = "REPORT_CUSTOM_METRICS"  # of config.pbtxt, as the vLLM backend has it
SPELLINGS = {"true": True, "yes": True, "false": False, "no": False}


def families(dialects: Collection[str]) -> list[Family]:
    """Those of all `dialects`; one that several have is there once."""
    return list({family.name: family for dialect in dialects for family in DIALECTS[dialect]}.values())


def chosen(config: EngineConfig, model_config: Mapping[str, Any], folder: Path) -> list[str]:
    """The dialects of a model: its `metrics_dialects`, to which the switches of Triton's vLLM backend add vLLM's, or
    from which they take it: REPORT_CUSTOM_METRICS in config.pbtxt, and `disable_log_stats` in model.json.

    Args:
        model_config: the server's, with the `parameters` of config.pbtxt.
        folder: of the model's version.

    Raises:
        ConfigError: the parameter is neither true nor false.
    """
    others: list[str] = [dialect for dialect in config.metrics_dialects if dialect != "vllm"]
    shown = "vllm" in config.metrics_dialects
    if (entry := model_config.get("parameters", {}).get(PARAMETER)) is not None:
        said = entry["string_value"]
        if said.lower() not in SPELLINGS:
            raise ConfigError(f"config.pbtxt: {PARAMETER}: expected true or false, got {said!r}")
        shown = SPELLINGS[said.lower()]
    file = version_folder.settings_file(folder)
    disabled = file.name == version_folder.VLLM_FILE and read_json(file).get("disable_log_stats")
    return [*others, "vllm"] if shown and str(disabled).lower() != "true" else others
