"""FileSystem is every call that the disk tier makes to the operating system: the seam at which tests let it fail."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from mmap import PAGESIZE, mmap
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger(__name__)


class FoundFile(NamedTuple):
    """A file of a folder, as a scan sees it."""

    name: str
    size: int  # bytes
    used_ns: int  # when it was written, or last read


class FileSystem:
    """One method a system call. All but `close` raise OSError."""

    def open(self, path: Path, flags: int) -> int:
        """A descriptor that child processes do not get; what is created is readable for its owner alone."""
        return os.open(path, flags | os.O_CLOEXEC, 0o600)

    def close(self, fd: int) -> None:
        """Never fails: the descriptor is gone whatever the kernel says, and a lost write shows in the checksum."""
        with suppress(OSError):
            os.close(fd)

    def try_lock(self, fd: int) -> None:
        """The kernel gives the lock back when the file is closed, and so when its process dies.

        Raises: BlockingIOError, another descriptor has the lock.
        """
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def size(self, fd: int) -> int:
        return os.fstat(fd).st_size

    def resize(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def read(self, fd: int, pieces: Sequence[memoryview], offset: int) -> int:
        """Bytes that were read into the pieces, maybe fewer than there are; 0 at the end of the file."""
        return os.preadv(fd, pieces, offset)

    def write(self, fd: int, pieces: Sequence[memoryview], offset: int) -> int:
        """Bytes that were written, maybe fewer than there are."""
        return os.pwritev(fd, pieces, offset)

    def sync(self, fd: int) -> None:
        os.fdatasync(fd)

    def rename(self, old: Path, new: Path) -> None:
        os.rename(old, new)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def mark_used(self, fd: int) -> None:
        """Set the modification time to now: file systems are often mounted without times of access."""
        os.utime(fd)

    def scan(self, path: Path) -> list[FoundFile]:
        """All files of a folder. One that leaves meanwhile may be missing."""
        found = []
        with os.scandir(path) as entries:
            for entry in entries:
                try:
                    facts = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                found.append(FoundFile(entry.name, facts.st_size, facts.st_mtime_ns))
        return found


def has_direct_reads(files: FileSystem, path: Path) -> bool:
    """Whether a file can be read past the page cache. Some file systems refuse when it is opened, others when it is
    read."""
    try:
        fd = files.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            files.read(fd, [memoryview(mmap(-1, PAGESIZE))], 0)
        finally:
            files.close(fd)
    except OSError as error:
        log.info("%s: reads go through the page cache, for the file system takes no others: %s", path.parent, error)
        return False
    return True
