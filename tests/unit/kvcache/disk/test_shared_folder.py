"""A folder of the disk tier that engines share: one bound and one lock for all, and any of them may die at any time."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from errno import EIO
from itertools import count
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from support.kvcache.faulty_files import FaultyFiles
from support.kvcache.pages_of_tests import (
    FILE_BYTES,
    content,
    files_bytes,
    folder,
    numbers,
    other,
    payload,
    read,
    write,
)

from nanoflow_backend.kvcache.disk import page_folder
from nanoflow_backend.kvcache.disk.file_system import FileSystem, FoundFile
from nanoflow_backend.kvcache.disk.page_folder import FolderBusyError, FolderFullError, GoneError
from nanoflow_backend.kvcache.tier import FIRST


def test_the_bound_is_one_for_all_engines(tmp_path: Path) -> None:
    engines = [folder(tmp_path, pages=6, layout=other(rank=rank)) for rank in range(3)]
    for number in range(10):
        for rank, engine in enumerate(engines):
            layout = other(rank=rank)
            engine.write(content(number), payload(number, layout), FIRST)
            assert files_bytes(tmp_path) <= 6 * FILE_BYTES


@pytest.mark.parametrize("count", [b"", b"\0" * 3, b"\xff" * 8, b"\0" * 8])
def test_a_count_that_is_wrong_is_corrected_by_a_scan(tmp_path: Path, count: bytes) -> None:
    mine = folder(tmp_path, pages=4)
    for number in range(4):
        write(mine, number)
    (tmp_path / "lock").write_bytes(count)
    mine.scan()
    write(mine, 4)
    assert mine.used_bytes == files_bytes(tmp_path) == 4 * FILE_BYTES


@pytest.mark.parametrize("count", [b"", b"\0" * 3])
def test_what_nobody_has_counted_is_counted_before_more_is_written(tmp_path: Path, count: bytes) -> None:
    mine = folder(tmp_path, pages=4)
    for number in range(4):
        write(mine, number)
    (tmp_path / "lock").write_bytes(count)
    write(mine, 4)
    assert mine.used_bytes == files_bytes(tmp_path) <= 4 * FILE_BYTES


def test_a_folder_full_of_living_writers_takes_no_more(tmp_path: Path) -> None:
    mine, others = folder(tmp_path, pages=2), folder(tmp_path, pages=2)
    write(mine, 1)
    fds = [others._reserve(tmp_path / f"{number}.tmp") for number in range(2)]
    assert numbers(mine) == [1]
    with pytest.raises(FolderFullError, match=f"{2 * FILE_BYTES} of {2 * FILE_BYTES} bytes are in use"):
        write(mine, 2)
    assert not mine.contents
    for fd in fds:
        os.close(fd)  # the kernel does that for a dead process
    write(mine, 3)
    assert numbers(mine) == [3]
    assert files_bytes(tmp_path) == FILE_BYTES


def test_no_file_gets_or_loses_its_name_while_another_engine_counts(tmp_path: Path) -> None:
    """A scan that a rename overtakes may see the file twice, or not at all."""

    class Watching(FileSystem):
        changes = 0

        def rename(self, old: Path, new: Path) -> None:
            self.check()
            super().rename(old, new)

        def unlink(self, path: Path) -> None:
            self.check()
            super().unlink(path)

        def check(self) -> None:
            with (tmp_path / "lock").open() as lock, pytest.raises(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.changes += 1

    files = Watching()
    mine = folder(tmp_path, pages=2, files=files)
    for number in range(3):
        write(mine, number)
    mine.remove(content(2))
    assert files.changes == 5
    mine = folder(tmp_path, files=FaultyFiles(1, only="rename", error=OSError(EIO, "Input/output error")))
    write(mine, 3)
    with pytest.raises(OSError, match="Input/output error"):
        write(mine, 4)
    assert mine.used_bytes == files_bytes(tmp_path) == 2 * FILE_BYTES


def test_a_file_that_its_writer_removes_during_a_scan_is_no_error(tmp_path: Path) -> None:
    class Late(FileSystem):
        def scan(self, path: Path) -> list[FoundFile]:
            return [*super().scan(path), FoundFile("removed.tmp", FILE_BYTES, 0)]

    mine = folder(tmp_path, files=Late())
    write(mine, 1)
    mine.scan()
    assert mine.used_bytes == FILE_BYTES


def test_a_lock_that_another_engine_keeps_costs_the_page_and_not_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = folder(tmp_path)
    write(mine, 1)
    monkeypatch.setattr(page_folder, "LOCK_WAIT_S", 0.05)
    with (tmp_path / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for call in (lambda: write(mine, 2), mine.scan):
            with pytest.raises(FolderBusyError, match="another engine holds the lock"):
                call()
        assert read(mine, 1) == payload(1)
    write(mine, 2)
    assert numbers(mine) == [1, 2]


def test_an_engine_that_is_killed_leaves_whole_files_and_nothing_else(tmp_path: Path) -> None:
    """A real process, killed while it writes as fast as it can; the next engine finds all whole, at every kill."""
    context = get_context("fork")
    kept = 0
    for round in range(8):
        begun, says = context.Pipe(duplex=False)
        writer = context.Process(target=_write_forever, args=(tmp_path, round * 1000, 2 * round, says))
        writer.start()
        begun.recv_bytes()
        os.kill(writer.pid or 0, signal.SIGKILL)
        writer.join()
        after = folder(tmp_path, pages=40)
        after.scan()
        assert not list(tmp_path.glob("*.tmp"))
        for number in numbers(after):
            assert read(after, number) == payload(number)
        assert after.used_bytes == files_bytes(tmp_path) <= 40 * FILE_BYTES
        kept += len(after.contents)
    assert kept >= sum(2 * round for round in range(8))


def _write_forever(path: Path, first: int, pages: int, says: Connection) -> None:
    """And say so after so many pages."""
    mine = folder(path, pages=40)
    for number in count(first):
        if number == first + pages:
            says.send_bytes(b"begun")
        write(mine, number)


def test_engines_that_share_a_folder_read_whole_pages_within_the_bound(tmp_path: Path) -> None:
    processes = [get_context("fork").Process(target=_share, args=(tmp_path, seed)) for seed in range(2)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        time.sleep(0.005)
        assert _seen_bytes(tmp_path) <= 20 * FILE_BYTES
    assert [process.exitcode for process in processes] == [0, 0]
    after = folder(tmp_path, pages=20)
    after.scan()
    assert after.used_bytes == files_bytes(tmp_path)
    assert not list(tmp_path.glob("*.tmp"))


def _seen_bytes(path: Path) -> int:
    """With the lock, so that nothing is renamed or removed meanwhile."""
    with (path / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return sum(file.size for file in FileSystem().scan(path) if file.name != "lock")


def _share(path: Path, seed: int) -> None:
    import random

    draw, mine = random.Random(seed), folder(path, pages=20)
    reads = 0
    for step in range(300):
        number = draw.randrange(60)
        if step % 50 == 0:
            mine.scan()
        try:
            if content(number) in mine.contents:
                assert read(mine, number) == payload(number)
                reads += 1
            else:
                write(mine, number)
        except (GoneError, FolderBusyError):
            continue
    assert reads > 10
