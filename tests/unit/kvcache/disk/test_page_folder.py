"""The folder of the disk tier: bounded, and never wrong about what a file holds."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.kvcache.pages_of_tests import (
    FILE_BYTES,
    LAYOUT,
    content,
    files_bytes,
    folder,
    numbers,
    other,
    payload,
    read,
    write,
)

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.kvcache.disk.file_system import FileSystem
from nanoflow_backend.kvcache.disk.page_file import RefusedError
from nanoflow_backend.kvcache.disk.page_folder import GoneError, PageFolder
from nanoflow_backend.kvcache.tier import FIRST


def age(path: Path, number: int, used_s: int) -> None:
    (file,) = path.glob(f"*-{content(number).hex()}-*")
    os.utime(file, (used_s, used_s))


def test_what_is_written_is_found_and_read_by_the_next_process(tmp_path: Path) -> None:
    first = folder(tmp_path / "new" / "folder")
    write(first, 1)
    write(first, 2, parent=1)
    assert first.used_bytes == 2 * FILE_BYTES
    second = folder(tmp_path / "new" / "folder")
    assert not second.contents  # until it has looked
    second.scan()
    assert numbers(second) == [1, 2]
    assert second.used_bytes == files_bytes(tmp_path / "new" / "folder") == 2 * FILE_BYTES
    assert [read(second, 1), read(second, 2)] == [payload(1), payload(2)]


def test_nobody_but_the_owner_can_read_the_files(tmp_path: Path) -> None:
    write(folder(tmp_path / "kv"), 1)
    assert (tmp_path / "kv").stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "kv").iterdir()} == {0o600}


def test_a_page_that_is_not_there_is_gone(tmp_path: Path) -> None:
    mine, others = folder(tmp_path), folder(tmp_path)
    with pytest.raises(GoneError):
        read(mine, 1)
    write(mine, 1)
    others.scan()
    others.remove(content(1))
    others.remove(content(1))
    assert others.used_bytes == files_bytes(tmp_path) == 0
    with pytest.raises(GoneError, match="another engine removed it"):
        read(mine, 1)
    assert not mine.contents


def test_pages_of_other_layouts_are_not_seen_and_count(tmp_path: Path) -> None:
    layout = other(rank=1, payload_bytes=2000)
    theirs = folder(tmp_path, layout=layout)
    theirs.write(content(1), payload(1, layout), FIRST)
    mine = folder(tmp_path)
    mine.scan()
    assert not mine.contents
    write(mine, 1)
    assert mine.used_bytes == files_bytes(tmp_path) == FILE_BYTES + layout.file_bytes
    assert read(theirs, 1, layout) == payload(1, layout)


def test_a_file_under_another_ones_name_is_refused_and_removed(tmp_path: Path) -> None:
    mine = folder(tmp_path)
    write(mine, 1)
    write(mine, 2)
    (one,), (two,) = (list(tmp_path.glob(f"*-{content(number).hex()}-*")) for number in (1, 2))
    os.replace(one, two)
    with pytest.raises(RefusedError, match="expected the page 00000003"):
        read(mine, 2)
    assert not two.exists()
    assert numbers(mine) == [1]


def test_the_bound_holds_and_the_least_recently_used_go(tmp_path: Path) -> None:
    mine = folder(tmp_path, pages=5)
    for number in range(5):
        write(mine, number)
        age(tmp_path, number, 100 + number)
    read(mine, 0)  # used again
    write(mine, 5)
    assert numbers(mine) == [0, 2, 3, 4, 5]
    assert files_bytes(tmp_path) == mine.used_bytes == 5 * FILE_BYTES
    assert mine.evicted_pages == 1


def test_the_end_of_a_chain_goes_before_its_front(tmp_path: Path) -> None:
    mine = folder(tmp_path, pages=4)
    for number in range(4):
        write(mine, number, parent=number - 1 if number else None)
    for number in (10, 11):
        write(mine, number)
    assert numbers(mine) == [0, 1, 10, 11]


def test_a_large_folder_is_collected_many_pages_at_a_time(tmp_path: Path) -> None:
    mine = folder(tmp_path, pages=128)
    for number in range(129):
        write(mine, number)
    assert len(mine.contents) == 125
    assert mine.evicted_pages == 4


def test_a_smaller_bound_takes_effect_at_the_next_scan(tmp_path: Path) -> None:
    large = folder(tmp_path, pages=8)
    for number in range(8):
        write(large, number)
    small = folder(tmp_path, pages=3)
    small.scan()
    assert files_bytes(tmp_path) == 3 * FILE_BYTES
    assert len(small.contents) == 3


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_bytes(b"x" * 3 * FILE_BYTES)
    mine = folder(tmp_path, pages=2)
    for number in range(4):
        write(mine, number)
    assert (tmp_path / "notes.txt").exists()
    assert len(mine.contents) == 2


def test_what_cannot_be_a_folder_of_pages_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=f"bytes: expected {FILE_BYTES}, one page, or more, got 7"):
        PageFolder(tmp_path, 7, LAYOUT)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"disk_kv_cache.path: .*file: expected a folder that can be written"):
        folder(tmp_path / "file")


@pytest.mark.parametrize("refused", ["open", "read"])
def test_reads_go_past_the_page_cache_where_the_file_system_takes_them(refused: str, tmp_path: Path) -> None:
    direct: set[int] = set()

    class NoDirectReads(FileSystem):
        def open(self, path: Path, flags: int) -> int:
            if flags & os.O_DIRECT and refused == "open":
                raise OSError(22, "Invalid argument")
            fd = super().open(path, flags)
            (direct.add if flags & os.O_DIRECT else direct.discard)(fd)
            return fd

        def read(self, fd: int, pieces: Sequence[memoryview], offset: int) -> int:
            if fd in direct and refused == "read":
                raise OSError(22, "Invalid argument")
            return super().read(fd, pieces, offset)

    without = folder(tmp_path, files=NoDirectReads())
    without.write(content(1), payload(1), FIRST)
    assert read(without, 1) == payload(1)
    assert not without.direct
    assert not folder(tmp_path, direct=False).direct


@pytest.mark.parametrize("payload_bytes", [1000, 8192], ids=["any size", "whole blocks"])
def test_direct_reads_and_synced_writes_give_the_same(
    tmp_path_factory: pytest.TempPathFactory, payload_bytes: int
) -> None:
    tmp_path = tmp_path_factory.mktemp("disk")  # file systems in memory may have no direct reads
    layout = other(payload_bytes=payload_bytes)
    mine = folder(tmp_path, layout=layout, sync=True)
    if not mine.direct:
        pytest.skip("the file system has no direct reads")
    mine.write(content(1), payload(1, layout), FIRST)
    for into in (memoryview(mmap.mmap(-1, 8192))[:payload_bytes], memoryview(bytearray(payload_bytes + 1))[1:]):
        mine.read(content(1), into)
        assert into == payload(1, layout)
    (file,) = tmp_path.glob("*.page")
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(RefusedError, match="checksum"):
        read(mine, 1, layout)
