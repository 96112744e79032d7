"""check_output asks whether a result can be written to a file, before the work that leads to it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from nanoflow_backend.config.error import ConfigError

PROBE_BYTES = 2**16  # that must fit on the disk


def check_output(path: Path) -> None:
    """What is at `path` stays as it is; nothing is left there if there is nothing.

    Raises:
        ConfigError: it is neither a regular file nor the name of one to be, or cannot be written.
    """
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path}: expected a regular file, got something else")
        if path.exists():
            path.open("ab").close()
        with tempfile.TemporaryFile(dir=path.resolve().parent) as probe:
            probe.write(b"\0" * PROBE_BYTES)
            probe.flush()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
