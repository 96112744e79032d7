"""read_quantization reads what a folder's files say about quantization."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.quantization import Quantization
from nanoflow_backend.models.config_json import agreed
from nanoflow_backend.models.quantization import compressed_tensors, fbgemm, fine_grained, modelopt
from nanoflow_backend.models.quantization.refusal import refuse

KEYS = ("quantization_config", "compression_config")  # the second is compressed-tensors' older one
READERS: dict[str, Callable[[Mapping[str, Any], str], Quantization]] = {
    "compressed-tensors": compressed_tensors.read,
    "fp8": fine_grained.read,
    "modelopt": modelopt.read,
    "fbgemm_fp8": fbgemm.read,
}


def read_quantization(
    config: Mapping[str, Any], own_file: Mapping[str, Any] | None, origin: str
) -> Quantization | None:
    """What config.json says, or ModelOpt's own file; None where nothing is quantised. Keys of null say nothing.

    Args:
        origin: config.json's path, for messages.

    Raises:
        ConfigError: a format that is not read here, with those that are; or the two files differ.
    """
    given = agreed(config, KEYS, origin)
    key = next((key for key in KEYS if config.get(key) is not None), KEYS[0])
    quantization = None if given in (None, {}) else _read(given, f"{origin}: {key}")
    if own_file is None:
        return quantization
    path = Path(origin).with_name(modelopt.OWN_FILE)
    own = modelopt.read(_without_null(own_file), str(path))
    if quantization not in (None, own):
        raise ConfigError(f"{path} and {origin}: quantization_config say two things: remove one")
    return own


def _read(given: Any, origin: str) -> Quantization:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{origin}: expected an object or null, got {given!r}")
    method = given.get("quant_method")
    if method is None:
        raise ConfigError(f"{origin}: key 'quant_method' is missing")
    if method not in list(READERS):
        refuse(origin, f"quant_method {method!r}")
    return READERS[method](_without_null(given), origin)


def _without_null(given: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in given.items() if value is not None}
