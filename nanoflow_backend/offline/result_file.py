"""ResultFile is the output of a batch: one line for each line of the input, in its order, whatever ends first.

It is only ever appended to, a whole line at a time, so a kill costs no line that is in it; the next run goes on there.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Self

import msgspec

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.offline.job_file import JobLine
from nanoflow_backend.offline.made_with import MadeWith
from nanoflow_backend.offline.output import check_output
from nanoflow_backend.offline.result_line import ResultLine
from nanoflow_backend.offline.run_record import RunRecord


class ResultFile:
    """Locked while it is open. Every method raises ConfigError, in one line, where the file is not or no longer usable.

    Attributes:
        lines: results in the file.
        failed: how many of them are errors.
        tokens: output tokens in what was written since the file was opened.
        early_bytes: held in memory, of results that wait for those of lines before them.
    """

    def __init__(self, path: Path, input: Path) -> None:
        """Open or create the file, and lock it; it and its record keep what is in them until `resume` has looked."""
        self.path = path
        self.lines = self.failed = self.tokens = self.early_bytes = 0
        self._early: dict[int, ResultLine] = {}
        self._durable = 0  # lines of the input whose digests would outlive a power cut
        check_output(path)
        with self._errors():
            real = path.resolve()
            self._file = real.open("a+b")
            try:
                if path.samefile(input):
                    raise ConfigError(f"{path}: expected another file than the input")
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.close()
                raise ConfigError(f"{path}: expected a file that no other run is writing") from None
            except BaseException:
                self._file.close()
                raise
        self._record = RunRecord(real)
        self._bytes = 0  # of whole lines

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._record.close()
        self._file.close()

    def resume(self, lines: Iterator[JobLine], made_with: MadeWith) -> Iterator[JobLine]:
        """The lines of the input that have no result yet. A result that a kill left in part is cut off.

        Raises:
            ConfigError: the file has something else than results of these lines by this model; it is left as it is.
        """
        with self._errors():
            if os.fstat(self._file.fileno()).st_size == 0:
                self._record.begin(made_with)
                return lines
            digests = self._record.resume(made_with)
            self._file.seek(0)
            for text in self._file:
                line = next(lines, None)
                if line is None:
                    raise ConfigError(f"{self.path}: has more lines than the input")
                if not text.endswith(b"\n"):
                    self._check_part(text, line)
                    lines = chain([line], lines)
                    break
                self._check_result(text, line, next(digests, None))
                self.lines += 1
                self._bytes += len(text)
            self._record.keep(self.lines)
            self._file.truncate(self._bytes)  # not rewritten: another kill must not cost what is finished
        return lines

    def expect(self, number: int, digest: str) -> None:
        """Note that a result for this line will come. Call it for every line, in order."""
        with self._errors():
            self._record.add(digest)
        self._expected = number + 1

    def put(self, number: int, result: ResultLine) -> None:
        """Write the result of line `number` once those of all lines before it are written."""
        self._early[number] = result
        self.early_bytes += len(result.json)
        while self.lines in self._early:
            result = self._early.pop(self.lines)
            self._append(result.json + b"\n")
            self.early_bytes -= len(result.json)
            self.lines += 1
            self.failed += result.failed
            self.tokens += result.tokens

    def _append(self, text: bytes) -> None:
        with self._errors():
            if self.lines >= self._durable:
                self._record.sync()
                self._durable = self._expected
            rest = memoryview(text)
            try:
                while rest:
                    rest = rest[os.write(self._file.fileno(), rest) :]
            except BaseException:
                self._file.truncate(self._bytes)
                raise
        self._bytes += len(text)

    def _check_result(self, text: bytes, line: JobLine, digest: str | None) -> None:
        try:
            fields = msgspec.json.decode(text, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            fields = {}
        if digest is None or "id" not in fields or fields["id"] != line.id:
            raise ConfigError(
                f"{self.path}: line {line.number + 1} is not the result of the input's line {line.place} "
                f"(id {line.id!r}); expected its own output, or another --output"
            )
        if digest != line.digest:
            raise ConfigError(
                f"{self.path}: line {line.number + 1} is the result of another line than the input's line {line.place} "
                f"(id {line.id!r}), which has changed since; expected the same input, or another --output"
            )
        self.failed += "error" in fields

    def _check_part(self, text: bytes, line: JobLine) -> None:
        start = msgspec.json.encode({"id": line.id})[:-1] + b","
        if not (start.startswith(text) or text.startswith(start)):
            raise ConfigError(
                f"{self.path}: ends in a line that is not a part of the result of the input's line {line.place} "
                f"(id {line.id!r}); expected its own output, or another --output"
            )

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kept = f"; {self.lines} lines are done and kept: the same command goes on from there" if self.lines else ""
            raise ConfigError(f"{self.path}: {error.strerror}{kept}") from None
