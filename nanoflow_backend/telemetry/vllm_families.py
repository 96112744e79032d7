"""VLLM_FAMILIES are the metrics that Triton's vLLM backend reports, under vLLM's names, for what was made for those.

They have the labels that they have there, model and version, and so add up over the instances of a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from nanoflow_backend.config import version_folder
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.file import read_json
from nanoflow_backend.telemetry.families import ASKED_N, FAMILIES, Family

PARAMETER = "REPORT_CUSTOM_METRICS"  # of config.pbtxt
SPELLINGS = {"true": True, "yes": True, "false": False, "no": False}
# Bounds that vLLM has too, and some between; no more than 12, whose order on the page is known (`metrics._exposition`).
FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
TOKEN_S = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
REQUEST_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)
TOKENS = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0, 131072.0)


def _called(name: str, ours: str, bounds: tuple[float, ...] | None = None) -> Family:
    """One of our families under another name."""
    (family,) = (family for family in FAMILIES if family.name == ours)
    return msgspec.structs.replace(family, name=name, bounds=bounds)


VLLM_FAMILIES = (
    _called("vllm:prompt_tokens_total", "nanoflow_prompt_tokens_total"),
    _called("vllm:generation_tokens_total", "nanoflow_generation_tokens_total"),
    _called("vllm:time_to_first_token_seconds", "nanoflow_time_to_first_token_seconds", FIRST_TOKEN_S),
    _called("vllm:time_per_output_token_seconds", "nanoflow_inter_token_latency_seconds", TOKEN_S),
    _called("vllm:e2e_request_latency_seconds", "nanoflow_e2e_request_latency_seconds", REQUEST_S),
    _called("vllm:request_prompt_tokens", "nanoflow_request_prompt_tokens", TOKENS),
    _called("vllm:request_generation_tokens", "nanoflow_request_generation_tokens", TOKENS),
    Family("vllm:request_params_n", "histogram", "Sequences that a prompt was asked to have, its n",
           lambda view: view.asked_n, of_stub=True, bounds=ASKED_N),
)  # fmt: skip


def are_reported(model_config: Mapping[str, Any], folder: Path) -> bool:
    """Whether a model shows them: config.pbtxt says so, and its model.json has no `disable_log_stats`; as there.

    Args:
        model_config: the server's, with the `parameters` of config.pbtxt.
        folder: of the model's version.

    Raises:
        ConfigError: the parameter is neither true nor false.
    """
    said = model_config.get("parameters", {}).get(PARAMETER, {"string_value": "false"})["string_value"]
    if said.lower() not in SPELLINGS:
        raise ConfigError(f"config.pbtxt: {PARAMETER}: expected true or false, got {said!r}")
    file = version_folder.settings_file(folder)
    disabled = file.name == version_folder.VLLM_FILE and read_json(file).get("disable_log_stats")
    return SPELLINGS[said.lower()] and str(disabled).lower() != "true"
