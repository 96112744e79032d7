"""State: the files of a search beside its result. What one of them holds is not done again, so a run may be cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

T = TypeVar("T")
REQUEST = "request.json"


class SearchError(ValueError):
    """A search that cannot be done, or not go on: the message says what stands in its way."""


class Once(Protocol):
    """Make what is called `name`, unless that was done before."""

    def __call__(self, name: str, kind: type[T], make: Callable[[], T]) -> T: ...


def always(name: str, kind: type[T], make: Callable[[], T]) -> T:
    """Once for those who keep nothing."""
    return make()


class State:
    """A folder with a file for each thing that was done; `.json` for people, `.msgpack` for ourselves."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def once(self, name: str, kind: type[T], make: Callable[[], T]) -> T:
        """What the file `name` holds; where there is none, what `make` gives, which the file holds from now on.

        Raises:
            SearchError: the file holds something else.
        """
        path = self.folder / name
        json = path.suffix == ".json"
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            made = make()
            write(
                path, msgspec.json.format(msgspec.json.encode(made)) + b"\n" if json else msgspec.msgpack.encode(made)
            )
            return made
        try:
            return msgspec.json.decode(content, type=kind) if json else msgspec.msgpack.decode(content, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise SearchError(f"{path}: {error}; without this file that part is done again") from None

    def within(self, name: str) -> State:
        """Of a part, in a folder of its own."""
        return State(self.folder / name)

    @property
    def claimed(self) -> bool:
        return (self.folder / REQUEST).exists()

    def claim(self, request: msgspec.Struct) -> None:
        """Raises: SearchError, what is in the folder was done for another request; it says how they differ."""
        there = self.once(REQUEST, type(request), lambda: request)
        differences = [
            f"{key} is {getattr(there, key)!r} there and {getattr(request, key)!r} here"
            for key in request.__struct_fields__
            if getattr(there, key) != getattr(request, key)
        ]
        if differences:
            raise SearchError(
                f"{self.folder} is the state of another search: {'; '.join(differences)}. Go on with that one, "
                f"delete the folder, or choose another --out"
            )


def write(path: Path, content: bytes) -> None:
    """At once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)
