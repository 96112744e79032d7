"""DiskStore: a page or none, and a count of what went wrong."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from errno import ENOSPC
from pathlib import Path

import pytest
from support.kvcache.faulty_files import FaultyFiles
from support.kvcache.pages_of_tests import FILE_BYTES, LAYOUT, content, folder, payload
from support.waiting import until

from nanoflow_backend.kvcache.disk.disk_store import DiskStore
from nanoflow_backend.kvcache.disk.file_system import FileSystem, FoundFile


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DiskStore]:
    store = DiskStore(folder(tmp_path), LAYOUT)
    yield store
    store.close()


def read(store: DiskStore, number: int) -> bytes | None:
    into = bytearray(LAYOUT.payload_bytes)
    return bytes(into) if store.read(content(number), memoryview(into)) else None


def page_of(path: Path, number: int) -> Path:
    (file,) = path.glob(f"*-{content(number).hex()}-*")
    return file


def test_the_next_process_finds_what_this_one_kept(store: DiskStore, tmp_path: Path) -> None:
    assert not store.lookup(content(1))
    assert store.write(content(1), payload(1))
    assert store.write(content(2), payload(2), parent=content(1))
    assert store.lookup(content(2))
    again = DiskStore(folder(tmp_path), LAYOUT)
    until(lambda: again.lookup(content(1)) and again.lookup(content(2)))
    assert [read(again, 1), read(again, 2)] == [payload(1), payload(2)]
    again.close()
    stats = again.stats
    assert (stats.pages, stats.used_bytes, stats.max_bytes) == (2, 2 * FILE_BYTES, 100 * FILE_BYTES)
    assert (stats.read_pages, stats.read_bytes, stats.written_pages) == (2, 2000, 0)
    assert stats.read_s > 0
    assert store.stats.written_bytes == 2000


def test_what_is_there_already_is_not_written_again(store: DiskStore) -> None:
    assert store.write(content(1), payload(1))
    assert store.write(content(1), payload(1))
    assert store.stats.written_pages == 1
    assert store.stats.used_bytes == FILE_BYTES


def test_a_file_that_changed_is_a_miss_that_is_named_and_counted_and_gone(
    store: DiskStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(3):
        store.write(content(number), payload(number))
        file = page_of(tmp_path, number)
        file.write_bytes(file.read_bytes()[: -1 if number else None] + b"?" * (number < 2))
    with caplog.at_level(logging.WARNING):
        assert [read(store, number) for number in range(3)] == [None, None, None]
    assert store.stats.refused_files == {"size": 2, "checksum": 1}
    assert [record.message.count(".page: expected ") for record in caplog.records] == [1, 1]  # the first of each kind
    assert not list(tmp_path.glob("*.page"))
    assert not any(store.lookup(content(number)) for number in range(3))
    assert store.write(content(1), payload(1))
    assert read(store, 1) == payload(1)


def test_what_another_engine_removed_is_a_miss(store: DiskStore, tmp_path: Path) -> None:
    store.write(content(1), payload(1))
    page_of(tmp_path, 1).unlink()
    assert read(store, 1) is None
    assert (store.stats.missing_files, store.stats.failed, store.stats.pages) == (1, 0, 0)


def test_a_full_disk_is_said_once_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Full(FileSystem):
        def write(self, fd: int, pieces: list[memoryview], offset: int) -> int:
            if pieces[-1].nbytes > 8:
                raise OSError(ENOSPC, "No space left on device")
            return super().write(fd, pieces, offset)

    store = DiskStore(folder(tmp_path, files=Full()), LAYOUT)
    with caplog.at_level(logging.WARNING):
        assert not any(store.write(content(number), payload(number)) for number in range(3))
    store.close()
    assert (store.stats.failed, store.stats.pages, store.stats.used_bytes) == (3, 0, 0)
    assert [record.message for record in caplog.records] == [
        "the disk tier goes on without what failed: [Errno 28] No space left on device"
    ]


def test_removed_pages_are_gone(store: DiskStore, tmp_path: Path) -> None:
    store.write(content(1), payload(1))
    assert store.remove(content(1))
    assert store.remove(content(1))
    assert not store.lookup(content(1))
    assert not list(tmp_path.glob("*.page"))


def test_a_scan_shows_what_other_engines_wrote(store: DiskStore, tmp_path: Path) -> None:
    neighbour = DiskStore(folder(tmp_path), LAYOUT, rescan_s=0.01)
    store.write(content(1), payload(1))
    until(lambda: neighbour.lookup(content(1)))
    store.remove(content(1))
    until(lambda: not neighbour.lookup(content(1)))
    neighbour.close()


def test_nobody_waits_for_the_scan(tmp_path: Path) -> None:
    folder(tmp_path).write(content(1), payload(1), content(0))
    may_go_on = threading.Event()

    class Slow(FileSystem):
        def scan(self, path: Path) -> list[FoundFile]:
            may_go_on.wait()
            return super().scan(path)

    store = DiskStore(folder(tmp_path, files=Slow()), LAYOUT)
    assert not store.lookup(content(1))
    assert read(store, 1) is None
    may_go_on.set()
    until(lambda: store.lookup(content(1)))
    assert read(store, 1) == payload(1)
    store.close()


def test_threads_that_write_and_read_at_once_keep_the_bound(tmp_path: Path) -> None:
    files = FaultyFiles()
    store = DiskStore(folder(tmp_path, pages=10, files=files), LAYOUT)
    wrong: list[int] = []

    def run(seed: int) -> None:
        for step in range(60):
            number = (seed * 7 + step * 5) % 20
            store.write(content(number), payload(number))
            found = read(store, number)
            if found is not None and found != payload(number):
                wrong.append(number)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.close()
    assert not wrong
    assert not store.stats.refused_files
    assert store.stats.read_pages > 60
    assert len(list(tmp_path.glob("*.page"))) <= 10
    assert not list(tmp_path.glob("*.tmp"))
