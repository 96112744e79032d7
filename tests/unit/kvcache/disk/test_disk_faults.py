"""Whatever fails while pages are written, at whichever call, and wherever a kill comes: files are whole, or go."""

from __future__ import annotations

import os
import random
import resource
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from errno import EIO, EMFILE, ENOSPC
from multiprocessing import get_context
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.kvcache.faulty_files import FaultyFiles, Killed
from support.kvcache.pages_of_tests import FILE_BYTES, content, folder, number_of, payload, read, write

from nanoflow_backend.kvcache.disk.page_folder import GoneError

PAGES = 4  # that the folder takes


def work(path: Path, files: FaultyFiles, seed: int) -> None:
    """Write, read, remove and collect, over a bound that is too small. What fails is forgotten."""
    draw = random.Random(seed)
    mine = folder(path, pages=PAGES, files=files, sync=True)
    for _ in range(6):
        number = draw.randrange(12)
        action = draw.choice(["write", "write", "write", "read", "remove", "scan"])
        try:
            if action == "write":
                write(mine, number, parent=number - 1 if number % 3 else None)
                assert content(number) in mine.contents
            elif action == "read":
                assert read(mine, number) == payload(number)
            elif action == "remove":
                mine.remove(content(number))
            else:
                mine.scan()
        except (OSError, GoneError):
            continue


def check(path: Path) -> None:
    """What the next engine finds: whole pages within the bound, a right count, nothing else; and it can go on."""
    after = folder(path, pages=PAGES)
    after.scan()
    assert not list(path.glob("*.tmp"))
    for name in list(after.contents):
        number = number_of(name)
        assert read(after, number) == payload(number)  # a file that is not whole would raise
    assert after.used_bytes == FILE_BYTES * len(after.contents) <= PAGES * FILE_BYTES
    write(after, 99)
    assert read(after, 99) == payload(99)


def calls_of(path: Path, seed: int) -> int:
    files = FaultyFiles()
    work(path, files, seed)
    return files.all_calls


def every_call(tmp_path: Path) -> Iterator[tuple[Path, int, int]]:
    """A folder with two pages, for each seed and each call that its work makes."""
    for seed in range(8):
        for at in range(calls_of(tmp_path / f"whole {seed}", seed) + 5):
            path = tmp_path / f"{seed} {at}"
            start = folder(path, pages=PAGES)
            write(start, 0)
            write(start, 1, parent=0)
            yield path, seed, at


def test_a_kill_between_any_two_calls_leaves_whole_pages(tmp_path: Path) -> None:
    killed = 0
    for path, seed, at in every_call(tmp_path):
        files = FaultyFiles(at)
        try:
            work(path, files, seed)
        except Killed:
            killed += 1
        files.bury()
        files_bytes = sum(file.stat().st_size for file in path.glob("*.page"))
        assert files_bytes <= PAGES * FILE_BYTES
        check(path)
    assert killed > 300


def test_an_error_of_any_call_costs_at_most_a_page(tmp_path: Path) -> None:
    for path, seed, at in every_call(tmp_path):
        code = (ENOSPC, EIO, EMFILE)[(seed + at) % 3]
        files = FaultyFiles(at, error=OSError(code, os.strerror(code)))
        try:
            work(path, files, seed)
        except ValueError:  # ConfigError: it happened before there was a folder
            assert at < 10
        assert not files.open_fds
        check(path)


@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**32), kills=st.lists(st.integers(0, 120), max_size=4))
def test_engines_one_after_the_other_killed_anywhere(tmp_path: Path, seed: int, kills: list[int]) -> None:
    path = tmp_path / f"{seed} {kills}"
    for life, at in enumerate(kills):
        files = FaultyFiles(at)
        with suppress(Killed):
            work(path, files, seed + life)
        files.bury()
    check(path)


def test_a_living_neighbour_is_not_disturbed_by_kills(tmp_path: Path) -> None:
    """Its temporary file stays, though others scan; it gets its name in the end."""
    neighbour = folder(tmp_path, pages=PAGES)
    temporary = tmp_path / "alive.tmp"
    fd = neighbour._reserve(temporary)
    for at in range(20, 60, 3):
        files = FaultyFiles(at)
        with suppress(Killed):
            work(tmp_path, files, seed=3)
        files.bury()
        folder(tmp_path, pages=PAGES).scan()
        assert temporary.exists()
    os.close(fd)
    check(tmp_path)
    assert not temporary.exists()


def test_a_file_system_that_is_full_takes_what_fits(tmp_path: Path) -> None:
    """A real one, in memory; mounting it needs privileges that not every machine gives."""
    path = tmp_path / "full"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", path], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        mine = folder(path, pages=100)
        kept: list[int] = []
        for number in range(40):
            with suppress(OSError):
                write(mine, number)
                kept.append(number)
        with pytest.raises(OSError, match="No space left"):
            write(mine, 40)
        assert 3 <= len(kept) < 15
        assert not list(path.glob("*.tmp"))
        for number in kept:
            assert read(mine, number) == payload(number)
        assert mine.used_bytes == len(kept) * FILE_BYTES
    finally:
        subprocess.run(["umount", path], check=True)


def test_a_process_that_may_write_no_more_keeps_what_it_has(tmp_path: Path) -> None:
    """The limit of a file's size, which the kernel enforces in the midst of a write."""
    child = get_context("fork").Process(target=_write_below_a_limit, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == 0
    check(tmp_path)


def _write_below_a_limit(path: Path) -> None:
    mine = folder(path, pages=PAGES)
    write(mine, 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES // 2, resource.RLIM_INFINITY))
    with pytest.raises(OSError, match="File too large"):
        write(mine, 2)
    assert list(mine.contents) == [content(1)]
    assert not list(path.glob("*.tmp"))
    assert read(mine, 1) == payload(1)
    assert mine.used_bytes == FILE_BYTES
