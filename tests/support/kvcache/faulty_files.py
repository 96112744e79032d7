"""FaultyFiles: a FileSystem of which one call fails, or is the last one that its process makes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

from nanoflow_backend.kvcache.disk.file_system import FileSystem


class Killed(BaseException):
    """The process is dead: nothing that it still says reaches the operating system."""


class FaultyFiles(FileSystem):
    """Call number `at`, of all or of those to `only`, raises `error`; without one the process dies there.

    Half of what a dying or failing `write` was given is written. What a dead process had open is closed by `bury`, as
    the kernel does it.
    """

    def __init__(self, at: int = -1, *, only: str | None = None, error: OSError | None = None) -> None:
        self.calls: Counter[str] = Counter()
        self.open_fds: set[int] = set()
        self.dead = False
        self._at, self._only, self._error = at, only, error

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        return self._counted(name, found) if name in vars(FileSystem) else found

    def sync(self, fd: int) -> None:
        """Counts like any call, and waits for no disk: a kill tears nothing that was written."""

    def bury(self) -> None:
        self.dead = True
        for fd in self.open_fds:
            os.close(fd)
        self.open_fds.clear()

    @property
    def all_calls(self) -> int:
        return self.calls.total()

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            if self.dead:
                raise Killed
            number = self.calls[name] if self._only else self.all_calls
            self.calls[name] += 1
            if number == self._at and self._only in (None, name):
                if name == "write" and args[1][-1].nbytes > 8:  # not the count of the folder
                    fd, pieces, offset = args
                    call(fd, [*pieces[:-1], pieces[-1][: pieces[-1].nbytes // 2]], offset)
                self.dead = self._error is None
                if self._error is None:
                    raise Killed
                if name != "close":
                    raise self._error
            result = call(*args)
            if name == "open":
                self.open_fds.add(result)
            elif name == "close":
                self.open_fds.discard(args[0])
            return result

        return counted
