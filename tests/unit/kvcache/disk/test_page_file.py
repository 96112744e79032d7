"""A page's file is read back bit for bit, or refused by the field that is wrong."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from support.kvcache.pages_of_tests import FILE_BYTES, LAYOUT, content, other, payload

from nanoflow_backend.kvcache.disk.disk_stats import Refusal
from nanoflow_backend.kvcache.disk.file_system import FileSystem
from nanoflow_backend.kvcache.disk.page_file import (
    HEADER_BYTES,
    PageLayout,
    RefusedError,
    page_header,
    read_page,
    write_page,
)
from nanoflow_backend.kvcache.tier import FIRST

WHOLE = page_header(LAYOUT, content(1), FIRST, payload(1)) + bytes(payload(1))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(WHOLE)
    return path


def read(path: Path, layout: PageLayout = LAYOUT, number: int = 1) -> bytes:
    into = bytearray(layout.payload_bytes)
    fd = os.open(path, os.O_RDONLY)
    try:
        read_page(FileSystem(), fd, layout, content(number), memoryview(into))
    finally:
        os.close(fd)
    return bytes(into)


def refusal(path: Path, **asked: object) -> Refusal:
    with pytest.raises(RefusedError) as refused:
        read(path, **asked)
    return refused.value.reason


def test_the_format_is_as_documented() -> None:
    magic, version, header, length, layout, name, parent, text = struct.unpack_from("<8sIIQ32s32s32sH", WHOLE)
    assert (magic, version, header, length) == (b"NanoFlKV", 1, 4096, 1000)
    assert (layout, name, parent) == (LAYOUT.digest, content(1), bytes(32))
    assert b'"weights":"0123"' in WHOLE[122 : 122 + text]
    assert not any(WHOLE[122 + text : 4088])
    assert WHOLE[4088:4096] == xxhash.xxh3_64_digest(WHOLE[:4088] + WHOLE[4096:])[::-1]  # a digest is big-endian


def test_a_file_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    write_page(FileSystem(), fd, LAYOUT, content(1), FIRST, payload(1))
    os.close(fd)
    assert (tmp_path / "file").read_bytes() == WHOLE
    assert read(tmp_path / "file") == payload(1)


def test_pieces_may_come_a_few_bytes_at_a_time(path: Path, tmp_path: Path) -> None:
    class Slow(FileSystem):
        def read(self, fd: int, pieces: list[memoryview], offset: int) -> int:
            return super().read(fd, [pieces[0][:501]], offset)

        def write(self, fd: int, pieces: list[memoryview], offset: int) -> int:
            return super().write(fd, [pieces[0][:333]], offset)

    into = bytearray(LAYOUT.payload_bytes)
    fd = os.open(tmp_path / "slow", os.O_RDWR | os.O_CREAT)
    write_page(Slow(), fd, LAYOUT, content(1), FIRST, payload(1))
    read_page(Slow(), fd, LAYOUT, content(1), memoryview(into))
    os.close(fd)
    assert (tmp_path / "slow").read_bytes() == WHOLE
    assert into == payload(1)


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": "0124"},
        {"precision": "bfloat16"},
        {"layout": "2 x 4 x 1 x 8 x 4"},
        {"page_tokens": 16},
        {"rank": 1},
        {"world": 2},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_page_of_another_layout_is_refused(path: Path, changes: dict[str, object]) -> None:
    assert refusal(path, layout=other(**changes)) == Refusal.LAYOUT


def test_a_page_of_another_size_or_content_is_refused(path: Path) -> None:
    assert refusal(path, layout=other(payload_bytes=999)) == Refusal.SIZE
    assert refusal(path, number=2) == Refusal.CONTENT


@settings(max_examples=300, deadline=None, derandomize=True)
@given(at=st.integers(0, 8 * len(WHOLE) - 1))
def test_no_changed_bit_is_read_back(tmp_path_factory: pytest.TempPathFactory, at: int) -> None:
    """One bit of any field: header, key, filling, checksum, payload."""
    changed = bytearray(WHOLE)
    changed[at // 8] ^= 1 << at % 8
    path = tmp_path_factory.getbasetemp() / "changed"
    path.write_bytes(changed)
    fields = [(8, Refusal.MAGIC), (12, Refusal.VERSION), (24, Refusal.CHECKSUM), (56, Refusal.LAYOUT)]
    fields += [(88, Refusal.CONTENT), (FILE_BYTES, Refusal.CHECKSUM)]
    assert refusal(path) == next(reason for end, reason in fields if at // 8 < end)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_damaged_range_is_read_back(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Zeros where a power cut lost blocks, and anything else."""
    start = data.draw(st.integers(0, FILE_BYTES - 1))
    length = data.draw(st.integers(1, FILE_BYTES - start))
    filling = data.draw(st.sampled_from([b"\0", b"\xff", b"z"]))
    changed = WHOLE[:start] + filling * length + WHOLE[start + length :]
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(changed)
    if changed == WHOLE:
        assert read(path) == payload(1)
    else:
        refusal(path)


@pytest.mark.parametrize("size", [0, 1, 8, HEADER_BYTES - 1, HEADER_BYTES, FILE_BYTES - 1, FILE_BYTES + 1])
def test_files_that_are_cut_or_longer_are_refused(path: Path, size: int) -> None:
    path.write_bytes((WHOLE + b"x")[:size])
    assert refusal(path) == Refusal.SIZE


def test_a_file_that_is_cut_while_it_is_read_is_refused(path: Path) -> None:
    class Cut(FileSystem):
        def size(self, fd: int) -> int:
            found = super().size(fd)
            os.truncate(path, HEADER_BYTES + 10)
            return found

    fd = os.open(path, os.O_RDONLY)
    with pytest.raises(RefusedError, match=f"found {HEADER_BYTES + 10}"):
        read_page(Cut(), fd, LAYOUT, content(1), memoryview(bytearray(1000)))
    os.close(fd)


def test_a_disk_that_takes_nothing_is_an_error(path: Path) -> None:
    class Full(FileSystem):
        def write(self, fd: int, pieces: list[memoryview], offset: int) -> int:
            return 0

    with pytest.raises(OSError, match="5096 bytes could not be written"):
        write_page(Full(), 0, LAYOUT, content(1), FIRST, payload(1))


def test_what_cannot_be_a_page_is_named() -> None:
    with pytest.raises(ValueError, match="payload: expected 1000 bytes, got 999"):
        page_header(LAYOUT, content(1), FIRST, payload(1)[:-1])
    with pytest.raises(ValueError, match="expected 32 bytes each, got 31 and 32"):
        page_header(LAYOUT, content(1)[:-1], FIRST, payload(1))
    with pytest.raises(ValueError, match="layout: expected 3966 bytes"):
        page_header(other(weights="w" * 4000), content(1), FIRST, payload(1))
