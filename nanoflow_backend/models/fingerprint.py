"""Fingerprints tell files and weights apart, in seconds, whatever their size."""

from __future__ import annotations

import hashlib
from pathlib import Path

SPANS, SPAN_BYTES = 16, 2**16  # of a file, read for its digest: a minute's work on 100 GB would be too much


def file_digest(path: Path) -> str:
    """A digest of a file's size and content; of a large one, of its first bytes and spans spread evenly over it.

    The first bytes of a safetensors file name its tensors; training moves nearly every weight, so the spans show it.
    """
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as file:
        if size <= SPANS * SPAN_BYTES:
            digest.update(file.read())
        else:
            for span in range(SPANS):
                file.seek(span * (size - SPAN_BYTES) // (SPANS - 1))
                digest.update(file.read(SPAN_BYTES))
    return digest.hexdigest()


def weights_fingerprint(folder: Path, *how: object) -> str:
    """Of a checkpoint: another one where its configuration or a file of weights is, or `how` they are loaded.

    Raises: OSError, a file cannot be read.
    """
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    parts = [f"{path.name} {file_digest(path)}" for path in files]
    return hashlib.blake2b("\n".join([*parts, repr(how)]).encode(), digest_size=16).hexdigest()
