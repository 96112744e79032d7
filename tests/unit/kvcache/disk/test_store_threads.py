"""StoreThreads: every ticket comes back once, queues are bounded, and reads do not wait for writes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.kvcache.pages_of_tests import LAYOUT, content, folder, payload
from support.waiting import until

from nanoflow_backend.kvcache.disk.disk_store import DiskStore
from nanoflow_backend.kvcache.disk.file_system import FileSystem
from nanoflow_backend.kvcache.disk.store_threads import Ended, StoreThreads
from nanoflow_backend.kvcache.tier import FIRST


class Held(FileSystem):
    """Writes of pages wait until they may go on."""

    def __init__(self) -> None:
        self.may_go_on = threading.Event()
        self.writing = threading.Event()

    def write(self, fd: int, pieces: list[memoryview], offset: int) -> int:
        if pieces[-1].nbytes > 8:
            self.writing.set()
            self.may_go_on.wait()
        return super().write(fd, pieces, offset)


@pytest.fixture
def files() -> Held:
    return Held()


@pytest.fixture
def store(tmp_path: Path, files: Held) -> Iterator[DiskStore]:
    folder(tmp_path).write(content(0), payload(0), FIRST)
    store = DiskStore(folder(tmp_path, files=files), LAYOUT)
    until(lambda: store.lookup(content(0)))
    yield store
    files.may_go_on.set()
    store.close()


def polled(threads: StoreThreads, count: int) -> list[Ended]:
    ended: list[Ended] = []

    def all_there() -> bool:
        ended.extend(threads.poll())
        return len(ended) >= count

    until(all_there)
    return sorted(ended)


def test_every_ticket_comes_back_once_with_what_became_of_it(store: DiskStore, files: Held) -> None:
    files.may_go_on.set()
    threads = StoreThreads(store)
    into = [memoryview(bytearray(LAYOUT.payload_bytes)) for _ in range(5)]
    for number in range(1, 5):
        assert threads.write(number, content(number), payload(number), content(number - 1))
    assert polled(threads, 4) == [(number, True) for number in range(1, 5)]
    for number in range(5):
        assert threads.read(10 + number, content(number), into[number])
    assert threads.read(20, content(9), memoryview(bytearray(LAYOUT.payload_bytes)))
    assert polled(threads, 6) == [*((10 + number, True) for number in range(5)), (20, False)]
    assert into == [payload(number) for number in range(5)]
    assert threads.close()
    assert threads.poll() == []


def test_writes_that_find_the_queue_full_are_dropped_and_counted_and_reads_go_on(store: DiskStore, files: Held) -> None:
    threads = StoreThreads(store, writers=1, max_writes=2)
    assert threads.write(1, content(1), payload(1), FIRST)
    files.writing.wait()
    taken = [threads.write(number, content(number), payload(number), FIRST) for number in range(2, 6)]
    assert taken == [True, True, False, False]
    assert threads.dropped_writes == 2
    into = memoryview(bytearray(LAYOUT.payload_bytes))
    assert threads.read(10, content(0), into)
    assert polled(threads, 1) == [(10, True)]
    files.may_go_on.set()
    assert polled(threads, 3) == [(1, True), (2, True), (3, True)]
    assert not store.lookup(content(5))
    assert threads.close()


def test_reads_that_find_the_queue_full_are_refused_and_counted(store: DiskStore) -> None:
    may_go_on, begun = threading.Event(), threading.Event()

    class Slow(DiskStore):
        def __init__(self) -> None:
            pass

        def read(self, content: bytes, payload: memoryview) -> bool:
            begun.set()
            return may_go_on.wait()

    threads = StoreThreads(Slow(), readers=1, max_reads=1)
    into = memoryview(bytearray(LAYOUT.payload_bytes))
    assert threads.read(1, content(0), into)
    begun.wait()
    assert [threads.read(ticket, content(0), into) for ticket in (2, 3)] == [True, False]
    assert threads.refused_reads == 1
    may_go_on.set()
    assert polled(threads, 2) == [(1, True), (2, True)]
    assert threads.close()


def test_closing_drops_what_waits_and_says_if_the_disk_is_stuck(store: DiskStore, files: Held) -> None:
    threads = StoreThreads(store, writers=1)
    threads.write(1, content(1), payload(1), FIRST)
    files.writing.wait()
    threads.write(2, content(2), payload(2), FIRST)
    assert not threads.close(timeout_s=0.05)
    files.may_go_on.set()
    assert polled(threads, 1) == [(1, True)]
    until(lambda: not any(thread.is_alive() for thread, _ in threads._threads))
    assert not store.lookup(content(2))
