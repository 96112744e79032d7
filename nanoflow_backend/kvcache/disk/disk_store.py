"""DiskStore is the PageStore of one rank on disk: what fails costs a page and a count, and never the engine."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable

from nanoflow_backend.kvcache.disk.disk_stats import DiskStats
from nanoflow_backend.kvcache.disk.folder_index import Tell
from nanoflow_backend.kvcache.disk.page_file import PageLayout, RefusedError
from nanoflow_backend.kvcache.disk.page_folder import GoneError, PageFolder
from nanoflow_backend.kvcache.tier import FIRST

CLOSE_S = 5.0
RESCAN_S = 300.0  # 100,000 files take a second and a half
log = logging.getLogger(__name__)


class DiskStore:
    """A PageStore, see there; for any number of threads.

    A thread of its own looks at the folder at the start, and again every `rescan_s` seconds, for other engines write
    and remove, too: until it has, nothing is found, and nobody waits.
    """

    def __init__(self, folder: PageFolder, layout: PageLayout, *, rescan_s: float = RESCAN_S) -> None:
        self._folder, self._layout = folder, layout
        self._counts: Counter[str] = Counter()
        self._seconds = {"read": 0.0, "written": 0.0}
        self._counting = threading.Lock()
        self._rescan_s, self._closing = rescan_s, threading.Event()
        self._scanner = threading.Thread(target=self._scan, name="disk-kv-scan", daemon=True)
        self._scanner.start()

    def lookup(self, content: bytes) -> bool:
        """See PageStore: whether the page was there when last looked at."""
        return content in self._folder.contents

    def write(self, content: bytes, payload: memoryview, parent: bytes = FIRST) -> bool:
        """See PageStore. parent: the content of the page before it, which is kept for as long as this one."""
        if self.lookup(content):
            return True
        return self._timed("written", lambda: self._folder.write(content, payload, parent))

    def read(self, content: bytes, payload: memoryview) -> bool:
        """See PageStore. A file that is not whole, or of another layout, is removed."""
        return self._timed("read", lambda: self._folder.read(content, payload))

    def watch(self, tell: Tell) -> None:
        """Have somebody told of all that `lookup` finds, now and from now on; see FolderIndex."""
        self._folder.contents.watch(tell)

    def remove(self, content: bytes) -> bool:
        """Forget a page. False: its file is still there."""
        return self._guarded(lambda: self._folder.remove(content))

    def close(self) -> None:
        """See PageStore. Waits for a scan that has begun, but not for a disk that is stuck."""
        self._closing.set()
        self._scanner.join(CLOSE_S)

    @property
    def stats(self) -> DiskStats:
        with self._counting:
            counts, seconds = Counter(self._counts), dict(self._seconds)
        return DiskStats(
            pages=len(self._folder.contents),
            used_bytes=self._folder.used_bytes,
            max_bytes=self._folder.max_bytes,
            read_pages=counts["read"],
            read_bytes=counts["read"] * self._layout.payload_bytes,
            read_s=seconds["read"],
            written_pages=counts["written"],
            written_bytes=counts["written"] * self._layout.payload_bytes,
            write_s=seconds["written"],
            evicted_pages=self._folder.evicted_pages,
            missing_files=counts["missing"],
            refused_files={
                name.removeprefix("refused "): n for name, n in counts.items() if name.startswith("refused ")
            },
            failed=counts["failed"],
        )

    def _scan(self) -> None:
        self._guarded(self._folder.scan)
        while not self._closing.wait(self._rescan_s):
            self._guarded(self._folder.scan)

    def _timed(self, kind: str, call: Callable[[], None]) -> bool:
        start_s = time.perf_counter()
        done = self._guarded(call)
        with self._counting:
            self._counts[kind] += done
            self._seconds[kind] += time.perf_counter() - start_s
        return done

    def _guarded(self, call: Callable[[], None]) -> bool:
        """Whether it did what it should. Failures are counted, and the first of each kind is logged."""
        try:
            call()
        except GoneError:
            self._count("missing")
        except RefusedError as error:
            if self._count(f"refused {error.reason}") == 1:
                log.warning("the disk tier removed a file that it does not trust: %s", error)
        except OSError as error:
            if self._count("failed") == 1:
                log.warning("the disk tier goes on without what failed: %s", error)
        else:
            return True
        return False

    def _count(self, name: str) -> int:
        with self._counting:
            self._counts[name] += 1
            return self._counts[name]
