"""What else a path may be where a model's folder is expected, said so that the reader knows what to do next."""

from __future__ import annotations

from pathlib import Path

LFS_START = b"version https://git-lfs.github.com/spec/"  # of the small text that stands for a file
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
