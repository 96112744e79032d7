"""FolderIndex is what a folder is known to hold: contents of pages, and the names of their files."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping

Tell = Callable[[list[bytes], list[bytes]], None]  # contents that are there from now on, and that no longer are


class FolderIndex(Mapping[bytes, str]):
    """To be read and changed by any number of threads. One may be told of all changes, in order."""

    def __init__(self) -> None:
        self._names: dict[bytes, str] = {}
        self._changing = threading.Lock()
        self._tell: Tell = lambda found, gone: None

    def __getitem__(self, content: bytes) -> str:
        return self._names[content]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def watch(self, tell: Tell) -> None:
        """Call it with all that is there, and from now on with every change. It may be called from any thread that
        changes something, and must not do so itself."""
        with self._changing:
            self._tell = tell
            tell(list(self._names), [])

    def add(self, content: bytes, name: str) -> None:
        with self._changing:
            self._names[content] = name
            self._tell([content], [])

    def discard(self, content: bytes) -> str | None:
        """Forget a page. Returns the name of its file; None: it was not known."""
        with self._changing:
            name = self._names.pop(content, None)
            if name is not None:
                self._tell([], [content])
            return name

    def replace(self, names: dict[bytes, str]) -> None:
        """This is what a scan has found."""
        with self._changing:
            before, self._names = self._names, names
            found, gone = names.keys() - before.keys(), before.keys() - names.keys()
            if found or gone:
                self._tell(list(found), list(gone))
