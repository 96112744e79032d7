"""Secret is what the hosts of an engine share, from a file; what it proves and signs is made here, and never shown."""

from __future__ import annotations

import hmac
from pathlib import Path

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.file import read_file

LEAST_BYTES, MOST_BYTES = 32, 4096  # whoever hears a proof can try secrets in peace: it must not be a word
HOW = "make one with: openssl rand -hex 32"


class Secret:
    """The content of a file, without white space around it.

    Args:
        path: a file that its owner, and at most a group, may read.

    Raises:
        ConfigError: it cannot be read, others may read it, or it is empty or short.
    """

    def __init__(self, path: Path) -> None:
        content = read_file(path, MOST_BYTES).strip()
        if path.stat().st_mode & 0o007:
            raise ConfigError(f"{path}: expected a secret that others may not read: chmod o= {path}")
        if len(content) < LEAST_BYTES:
            raise ConfigError(f"{path}: expected a secret of {LEAST_BYTES} bytes or more, got {len(content)}; {HOW}")
        self._content = content

    def derive(self, purpose: bytes, *parts: bytes) -> bytes:
        """32 bytes that only who has the secret can make, others for each purpose and parts (HMAC-SHA256)."""
        framed = b"".join(len(part).to_bytes(4, "big") + part for part in (purpose, *parts))
        return hmac.digest(self._content, framed, "sha256")
