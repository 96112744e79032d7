"""Lists of modules that stay as they are, as the formats spell them -> as Quantization.excluded does."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.quantization import EVERYTHING
from nanoflow_backend.models.quantization.tensor_names import loaders_names


def names_and_patterns(listed: Iterable[str], origin: str) -> tuple[str, ...]:
    """Of compressed-tensors: full names, and "re:" with a pattern for a name's start. Raises: ConfigError."""
    return tuple(_checked(name, origin) if name.startswith("re:") else _loaders_name(name) for name in listed)


def prefixes_and_suffixes(listed: Iterable[str], origin: str) -> tuple[str, ...]:
    """Of transformers: patterns for whole modules at a name's start, or the end of a name. Raises: ConfigError."""
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return tuple(_checked(f"re:(?:{key}){boundary}|.*{re.escape(key)}$", origin) for key in listed)


def wildcards(listed: Iterable[str], origin: str) -> tuple[str, ...]:
    """Of ModelOpt: names of modules, whose parts are meant too, where * stands for anything. Raises: ConfigError."""
    return tuple(_checked(f"re:{fnmatch.translate(name)}|{fnmatch.translate(f'{name}.*')}", origin) for name in listed)


def others_than(targets: Sequence[str], origin: str) -> tuple[str, ...]:
    """What to exclude where compressed-tensors quantises `targets` only: names, patterns, or "Linear" for all."""
    if "Linear" in targets:
        return ()
    patterns = (t.removeprefix("re:") if t.startswith("re:") else f"{re.escape(t)}$" for t in targets)
    return (_checked(f"re:(?!{'|'.join(patterns)})", origin) if targets else EVERYTHING,)


def _loaders_name(module: str) -> str:
    return loaders_names(f"{module}.weight")[0].removesuffix(".weight")


def _checked(pattern: str, origin: str) -> str:
    try:
        re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise ConfigError(f"{origin}: expected names or patterns of modules, got {pattern!r}: {error}") from None
    return pattern
