"""The checkpoint of a search holds what is already done, in files beside the result, so that a run may be cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import msgspec

_T = TypeVar("_T")
KEY_FILE = "request.json"


class SearchError(ValueError):
    """A search cannot be done, or cannot go on: the message says why."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder with one file for each finished part: `.json` files for people, `.msgpack` files for the search itself.

    A checkpoint without a folder (None) keeps nothing, so that everything is done again.
    """

    folder: Path | None = None

    def load(self, name: str, kind: type[_T]) -> _T | None:
        """Return what the file `name` holds, decoded as `kind`; None where there is no such file.

        Raises:
            SearchError: the file holds something else.
        """
        if self.folder is None:
            return None
        path = self.folder / name
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        decode = msgspec.json.decode if path.suffix == ".json" else msgspec.msgpack.decode
        try:
            return decode(content, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise SearchError(f"{path}: {error}; without this file that part is done again") from None

    def save(self, name: str, value: _T) -> _T:
        """Write `value` to the file `name`, and return it."""
        if self.folder is not None:
            path = self.folder / name
            is_json = path.suffix == ".json"
            readable = msgspec.json.format(msgspec.json.encode(value)) + b"\n" if is_json else b""
            write_atomically(path, readable or msgspec.msgpack.encode(value))
        return value

    def within(self, name: str) -> Checkpoint:
        """Return the checkpoint of a part of the search, in a subfolder."""
        return Checkpoint(self.folder / name if self.folder is not None else None)

    @property
    def claimed(self) -> bool:
        """Whether plans have been made from a profile: from then on the profile stays as it is."""
        return self.folder is not None and (self.folder / KEY_FILE).exists()

    def claim(self, key: msgspec.Struct) -> None:
        """Bind the folder to one search; `key` holds all that its files depend on.

        Raises:
            SearchError: the folder is bound to another search; the message names every difference.
        """
        there = self.load(KEY_FILE, type(key)) or self.save(KEY_FILE, key)
        differences = [
            f"{name} is {getattr(there, name)!r} there and {getattr(key, name)!r} here"
            for name in key.__struct_fields__
            if getattr(there, name) != getattr(key, name)
        ]
        if differences:
            raise SearchError(
                f"{self.folder} is the state of another search: {'; '.join(differences)}. Go on with that one, "
                f"delete the folder, or choose another --out"
            )


@dataclass(frozen=True)
class Run:
    """One run of a search: the checkpoint that it goes on from, and the callbacks that show its progress."""

    checkpoint: Checkpoint = Checkpoint()
    say: Callable[[str], None] = lambda _: None
    advance: Callable[[], None] = lambda: None  # called once for each unit of a phase that is done

    def within(self, name: str, label: str = "") -> Run:
        """Return the run of one part: its checkpoint is the subfolder `name`, and its lines begin with `label`."""
        say = self.say
        labelled = (lambda line: say(f"{label}: {line}")) if label else say
        return replace(self, checkpoint=self.checkpoint.within(name), say=labelled)


def write_atomically(path: Path, content: bytes) -> None:
    """Write all of `content` to `path` or nothing, and make the folder that it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)
