"""A fingerprint tells checkpoints apart, in seconds, whatever their size."""

from __future__ import annotations

import hashlib
from pathlib import Path

from nanoflow_backend.model_folder import file_digest


def weights_fingerprint(folder: Path, *how: object) -> str:
    """Of a checkpoint: another one where its configuration or a file of weights is, or `how` they are loaded.

    Raises: OSError, a file cannot be read.
    """
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    parts = [f"{path.name} {file_digest(path)}" for path in files]
    return hashlib.blake2b("\n".join([*parts, repr(how)]).encode(), digest_size=16).hexdigest()
