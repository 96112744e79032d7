"""This module says what is wrong with a quantization, and what would work instead."""

from __future__ import annotations

from typing import NoReturn

from nanoflow_backend.config.error import ConfigError

WORKS = (
    "compressed-tensors (float-quantized), fp8, modelopt (FP8) and fbgemm_fp8 are read; and a 16-bit checkpoint can be "
    'quantised as it is loaded ("quantization": "fp8" in engine.json)'
)


def refuse(origin: str, what: str) -> NoReturn:
    """Raises: ConfigError, `what` of the file `origin` is not supported, and what is."""
    raise ConfigError(f"{origin}: {what} is not supported: {WORKS}")
