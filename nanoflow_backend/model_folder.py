"""What else a path may be where a model's folder is expected, said so that the reader knows what to do next; and what
tells one folder's files from another's."""

from __future__ import annotations

import hashlib
from pathlib import Path

LFS_START = b"version https://git-lfs.github.com/spec/"  # of the small text that stands for a file
SPANS, SPAN_BYTES = 16, 2**16  # of a file, read for its digest: a minute's work on 100 GB would be too much
EXPECTED = "expected a local Hugging Face folder with config.json and safetensors"


def what_is_wrong(folder: Path) -> str | None:
    """Why there is no config.json in `folder`; None where there is one."""
    if (folder / "config.json").exists():
        return None
    if not folder.exists():
        hint = ""
        if not folder.parent.exists():  # as for ORGANISATION/NAME, taken as a path
            name = f"{folder.parent.name}/{folder.name}"
            hint = f"; if {name} is a model of the Hugging Face hub: hf download {name} --local-dir {folder.name}"
        return f"{folder}: there is no such folder: {EXPECTED}{hint}"
    if folder.suffix == ".gguf" or (folder.is_dir() and any(folder.glob("*.gguf"))):
        return f"{folder}: GGUF is not read: {EXPECTED}; hubs have most models in that form too"
    if not folder.is_dir():
        return f"{folder}: is a file: {EXPECTED}"
    if snapshots := sorted(folder.glob("snapshots/*/config.json")):  # a download cache's folder of one model
        return f"{folder}: has its files in a folder of their own: {EXPECTED}, as in {snapshots[-1].parent}"
    if (folder / "params.json").exists():
        return f"{folder}: has the authors' own format (params.json): {EXPECTED}"
    return f"{folder / 'config.json'}: No such file or directory"


def is_lfs_pointer(start: bytes) -> bool:
    """A repository was cloned without its large files."""
    return start.startswith(LFS_START)


def lfs_hint(path: Path) -> str:
    return f"{path}: is a Git LFS pointer, not the file itself: run git lfs pull in {path.parent}"


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
