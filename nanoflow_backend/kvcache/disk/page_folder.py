"""PageFolder is the files of the disk tier: at most so many bytes of them, for all engines of a host that share it.

    lock                                          8 bytes: what the files take; whoever makes or removes some holds it
    RANDOM.tmp                                    a file being written, locked by its writer
    LAYOUT-CONTENT-PARENT.page                    a whole one; see page_file, and eviction for what the parent is for

A kill at any point leaves whole files, temporary ones, which the next scan finds unlocked and removes, and a count that
is too high, which the next scan corrects. Reading takes no lock: a file that is removed meanwhile is read to its end.
"""

from __future__ import annotations

import mmap
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EINVAL
from pathlib import Path
from uuid import uuid4

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.kvcache.disk.eviction import StoredPage, eviction_order
from nanoflow_backend.kvcache.disk.file_system import FileSystem, FoundFile, has_direct_reads
from nanoflow_backend.kvcache.disk.folder_index import FolderIndex
from nanoflow_backend.kvcache.disk.page_file import PageLayout, RefusedError, read_page, write_page

LOCK_WAIT_S = 3.0  # for other engines that scan; longer, and a page is better dropped
SLACK = 32  # a collection frees a part in so many, so that not every write has to collect
_SHORT = 16  # hexadecimal digits of a hash that are enough to know whom a page follows
_PAGE = re.compile(rf"([0-9a-f]{{{_SHORT}}})-([0-9a-f]{{64}})-([0-9a-f]{{{_SHORT}}})\.page")


class FolderFullError(OSError):
    """The files cannot be brought below the bound: others are writing, or some cannot be removed."""


class GoneError(Exception):
    """The page is not there (any more): another engine made room."""


class FolderBusyError(OSError):
    """Another engine holds the lock for longer than a page is worth waiting for."""


class PageFolder:
    """Pages of one layout in a folder, in which there may be those of others, too. For any number of threads.

    Attributes:
        contents: of the pages that are there, so far as known: others remove files, too.
        used_bytes: what all files took, those of other layouts and engines included, when last counted.
        evicted_pages: files that this engine removed to make room.
        direct: whether reads go past the kernel's page cache.
    """

    def __init__(
        self,
        path: Path,
        max_bytes: int,
        layout: PageLayout,
        *,
        sync: bool = False,
        direct: bool = True,
        files: FileSystem | None = None,
    ) -> None:
        """Make the folder if it is not there. `sync` waits until the disk has what is written; without it a power cut
        may tear files, which are refused then. `direct` reads past the page cache of the kernel, where the file system
        takes such reads: host memory that is to keep pages is the tier above, and the others' is left alone.

        Raises:
            ConfigError: the folder cannot be made or written, or the bound is below one page.
        """
        if max_bytes < layout.file_bytes:
            raise ConfigError(f"disk_kv_cache.bytes: expected {layout.file_bytes}, one page, or more, got {max_bytes}")
        self._path, self.max_bytes, self._layout = path, max_bytes, layout
        self._sync = sync
        self._files = files or FileSystem()
        self._prefix = layout.digest.hex()[:_SHORT]
        self.contents = FolderIndex()
        self.used_bytes = self.evicted_pages = 0
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._locked() as lock:
                self.used_bytes = self._read_count(lock) or 0
        except FolderBusyError:
            pass  # so it can be written
        except OSError as error:
            raise ConfigError(
                f"disk_kv_cache.path: {path}: expected a folder that can be written: {error.strerror}"
            ) from None
        self.direct = direct and has_direct_reads(self._files, path / "lock")

    def scan(self) -> None:
        """Find out what is there, remove what dead writers left, and what is above the bound.

        Raises:
            OSError: it stopped half way; FolderBusyError, it did not begin.
        """
        with self._locked() as lock:
            self._collect(lock, self.max_bytes)

    def write(self, content: bytes, payload: memoryview, parent: bytes) -> None:
        """Keep a page; see write_page for its arguments. When it returns the file is whole and has its name.

        Raises:
            OSError: nothing was kept; FolderFullError, FolderBusyError, see there.
            ValueError: see page_file.page_header.
        """
        temporary = self._path / f"{uuid4().hex}.tmp"
        fd = self._reserve(temporary)
        name = f"{self._prefix}-{content.hex()}-{parent.hex()[:_SHORT]}.page"
        try:
            write_page(self._files, fd, self._layout, content, parent, payload)
            if self._sync:
                self._files.sync(fd)
            with self._locked():  # a scan that a rename overtakes may see neither name
                self._files.rename(temporary, self._path / name)
                self.contents.add(content, name)
        except (OSError, ValueError):
            self._give_back(temporary)
            raise
        finally:
            self._files.close(fd)

    def read(self, content: bytes, payload: memoryview) -> None:
        """Fill the payload. What cannot be read back, now or ever, is no longer in `contents`.

        Raises:
            GoneError: see there.
            RefusedError: it was there, but not as it was written; it is removed.
            OSError: it could not be read.
        """
        name = self.contents.get(content)
        if name is None:
            raise GoneError(f"{self._path} does not have the page {content.hex()}")
        try:
            fd = self._files.open(self._path / name, os.O_RDONLY | (os.O_DIRECT if self.direct else 0))
            try:
                self._read(fd, content, payload)
                with suppress(PermissionError):  # the page is another user's
                    self._files.mark_used(fd)
            finally:
                self._files.close(fd)
        except RefusedError as error:
            self.contents.discard(content)
            with suppress(OSError):
                self._files.unlink(self._path / name)  # its size is uncertain: the next scan counts
            raise RefusedError(error.reason, f"{self._path / name}: {error}") from None
        except FileNotFoundError:
            self.contents.discard(content)
            raise GoneError(f"{self._path / name}: another engine removed it") from None
        except OSError:
            self.contents.discard(content)
            raise

    def remove(self, content: bytes) -> None:
        """Forget a page, if it is there.

        Raises:
            OSError: its file is still there.
        """
        if name := self.contents.discard(content):
            self._give_back(self._path / name)

    def _read(self, fd: int, content: bytes, payload: memoryview) -> None:
        """Direct reads of a payload that is not made of whole blocks go to memory that is, first."""
        try:
            read_page(self._files, fd, self._layout, content, payload)
        except OSError as error:
            if not self.direct or error.errno != EINVAL:
                raise
            blocks = -(-self._layout.file_bytes // mmap.PAGESIZE)
            aligned = memoryview(mmap.mmap(-1, blocks * mmap.PAGESIZE))
            read_page(self._files, fd, self._layout, content, payload, aligned)

    def _reserve(self, temporary: Path) -> int:
        """Make an empty file of a page's size within the bound, locked until it is closed: a scan knows it is alive."""
        size = self._layout.file_bytes
        with self._locked() as lock:
            used = self._read_count(lock)
            if used is None or used + size > self.max_bytes:
                used = self._collect(lock, self.max_bytes - max(size, self.max_bytes // SLACK))
            if used + size > self.max_bytes:
                raise FolderFullError(f"{self._path}: {used} of {self.max_bytes} bytes are in use")
            self._write_count(lock, used + size)  # first: after a kill the count is too high, never too low
            fd = self._files.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            try:
                self._files.try_lock(fd)
                self._files.resize(fd, size)
            except OSError:
                self._files.close(fd)
                self._files.unlink(temporary)
                self._write_count(lock, used)
                raise
        return fd

    def _give_back(self, path: Path) -> None:
        """Remove a file of a page's size, if another engine has not."""
        with suppress(FileNotFoundError):
            try:
                with self._locked() as lock:
                    self._files.unlink(path)
                    if used := self._read_count(lock):
                        self._write_count(lock, max(0, used - self._layout.file_bytes))
            except FolderBusyError:
                self._files.unlink(path)  # the count stays too high until the next scan

    def _collect(self, lock: int, limit: int) -> int:
        """With the lock held, count what is there anew, and remove until it takes `limit` bytes at most, or no page is
        left. Returns what it takes."""
        pages: list[StoredPage] = []
        used = 0
        for file in self._files.scan(self._path):
            if page := _stored_page(file):
                pages.append(page)
                used += page.size
            elif file.name.endswith(".tmp") and not self._removed(file.name):
                used += file.size
        gone = set()
        for page in eviction_order(pages):
            if used <= limit:
                break
            with suppress(FileNotFoundError):
                self._files.unlink(self._path / page.name)
            gone.add(page.name)
            used -= page.size
            self.evicted_pages += 1
        self._write_count(lock, used)
        own = (_PAGE.fullmatch(page.name) for page in pages if page.name not in gone)
        self.contents.replace({bytes.fromhex(name[2]): name[0] for name in own if name and name[1] == self._prefix})
        return used

    def _removed(self, name: str) -> bool:
        """Remove a temporary file whose writer is dead; False: the writer lives."""
        try:
            fd = self._files.open(self._path / name, os.O_RDONLY)
        except FileNotFoundError:
            return True  # by its writer, or by hand
        try:
            self._files.try_lock(fd)
            self._files.unlink(self._path / name)
        except BlockingIOError:
            return False
        finally:
            self._files.close(fd)
        return True

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Hold the lock of the folder: the descriptor of its file. Not of one descriptor for all: those of one process
        would not shut each other out."""
        lock = self._files.open(self._path / "lock", os.O_RDWR | os.O_CREAT)
        try:
            deadline_s = time.monotonic() + LOCK_WAIT_S
            while True:
                try:
                    self._files.try_lock(lock)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline_s:
                        raise FolderBusyError(f"{self._path}: another engine holds the lock") from None
                    time.sleep(0.0005)
            yield lock
        finally:
            self._files.close(lock)

    def _read_count(self, lock: int) -> int | None:
        """What all files take; None if nobody has counted."""
        count = memoryview(bytearray(8))
        if self._files.read(lock, [count], 0) < len(count):
            return None
        return int.from_bytes(count, "little")

    def _write_count(self, lock: int, used: int) -> None:
        self._files.write(lock, [memoryview(used.to_bytes(8, "little"))], 0)
        self.used_bytes = used


def _stored_page(file: FoundFile) -> StoredPage | None:
    """None: the file is no page."""
    found = _PAGE.fullmatch(file.name)
    if found is None:
        return None
    layout, content, parent = found.groups()
    return StoredPage(file.used_ns, file.size, file.name, f"{layout}-{content[:_SHORT]}", f"{layout}-{parent}")
