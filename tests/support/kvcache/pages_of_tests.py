"""Small pages of a made-up layout, whose payload follows from their content."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec

from nanoflow_backend.kvcache.disk.file_system import FileSystem
from nanoflow_backend.kvcache.disk.page_file import PageLayout
from nanoflow_backend.kvcache.disk.page_folder import PageFolder
from nanoflow_backend.kvcache.tier import FIRST

LAYOUT = PageLayout(
    weights="0123", precision="float32", layout="4 x 2 x 1 x 8 x 4", page_tokens=8, rank=0, world=1, payload_bytes=1000
)
FILE_BYTES = LAYOUT.file_bytes


def content(number: int) -> bytes:
    """Not the zeros that stand before the first page."""
    return (number + 1).to_bytes(4, "big") * 8


def number_of(content: bytes) -> int:
    return int.from_bytes(content[:4], "big") - 1


def payload(number: int, layout: PageLayout = LAYOUT) -> memoryview:
    return memoryview(random.Random(number).randbytes(layout.payload_bytes))


def folder(
    path: Path, pages: int = 100, layout: PageLayout = LAYOUT, files: FileSystem | None = None, **changes: bool
) -> PageFolder:
    """With room for so many pages."""
    return PageFolder(path, pages * layout.file_bytes, layout, files=files, **changes)


def write(folder: PageFolder, number: int, parent: int | None = None) -> None:
    folder.write(content(number), payload(number), FIRST if parent is None else content(parent))


def read(folder: PageFolder, number: int, layout: PageLayout = LAYOUT) -> bytes:
    into = bytearray(layout.payload_bytes)
    folder.read(content(number), memoryview(into))
    return bytes(into)


def other(**changes: object) -> PageLayout:
    return msgspec.structs.replace(LAYOUT, **changes)


def numbers(folder: PageFolder) -> list[int]:
    """Of the pages that it knows."""
    return sorted(map(number_of, folder.contents))


def files_bytes(path: Path) -> int:
    """Of all files there but the lock."""
    return sum(file.stat().st_size for file in path.iterdir() if file.name != "lock")
