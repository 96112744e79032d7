"""RunRecord is the file beside an output (out.jsonl.run) that says what its results were made of.

Its first line is MadeWith as JSON; each further line is the digest of one line of the input, in order. It is a file of
its own, so that an output holds nothing but results, line n for line n of the input, as readers of JSON lines expect.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.offline.job_file import DIGEST_BYTES
from nanoflow_backend.offline.made_with import MadeWith

SUFFIX = ".run"
START = b'{"nanoflow_batch":'  # of every record
DIGEST_LINE_BYTES = 2 * DIGEST_BYTES + 1


class RunRecord:
    """Digests are added before the results that they stand for, and `sync` puts them on the disk.

    Methods raise OSError where the file cannot be written, and ConfigError where it is not what it should be.
    """

    def __init__(self, output: Path) -> None:
        self.path = output.with_name(output.name + SUFFIX)
        self._output = output
        self._file: BinaryIO = io.BytesIO()  # until it is opened

    def begin(self, made_with: MadeWith) -> None:
        """Write a new record over an old one; never over a file that is none.

        Raises: ConfigError, another file is in the way.
        """
        if self.path.exists() and not self.path.is_file():
            raise ConfigError(f"{self.path}: expected a regular file, got something else")
        self._file = self.path.open("a+b")
        self._file.seek(0)
        start = self._file.read(len(START))
        if not START.startswith(start):  # a kill may have left a part
            self._file.close()
            raise ConfigError(f"{self.path}: is no record of a batch: expected no such file beside a new output")
        self._file.truncate(0)
        self._header_bytes = self._file.write(msgspec.json.encode(made_with) + b"\n")
        self.sync()

    def resume(self, made_with: MadeWith) -> Iterator[str]:
        """The digests of the lines read so far. Raises: ConfigError, where other things made those results."""
        try:
            self._file = self.path.open("r+b")
        except FileNotFoundError:
            raise ConfigError(
                f"{self._output}: expected an empty file or the output of a batch, which has {self.path.name} beside it"
            ) from None
        header = self._file.readline()
        try:
            before = msgspec.json.decode(header, type=MadeWith)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise ConfigError(f"{self.path}: is no record of a batch") from None
        if before.nanoflow_batch != made_with.nanoflow_batch:
            raise ConfigError(f"{self.path}: format {before.nanoflow_batch}, expected {made_with.nanoflow_batch}")
        if changes := made_with.changes_from(before):
            raise ConfigError(
                f"{self._output}: its results were made with something else: {'; '.join(changes)}. "
                "Expected the same again, or another --output"
            )
        self._header_bytes = len(header)
        return self._digests()

    def _digests(self) -> Iterator[str]:
        for text in self._file:
            if len(text) == DIGEST_LINE_BYTES and text.endswith(b"\n"):  # a kill may have left a part
                yield text[:-1].decode(errors="replace")

    def keep(self, lines: int) -> None:
        """Forget all digests but those of the first `lines` lines: what comes after may have changed."""
        self._file.seek(self._header_bytes + lines * DIGEST_LINE_BYTES)
        self._file.truncate()

    def add(self, digest: str) -> None:
        self._file.write(digest.encode() + b"\n")

    def sync(self) -> None:
        """Return when all that was added will outlive a power cut."""
        self._file.flush()
        os.fdatasync(self._file.fileno())

    def close(self) -> None:
        with contextlib.suppress(OSError):  # on a full disk: what could not be written stands for no result
            self._file.close()
