"""JobFile reads the input of `nanoflow batch`: JSON lines, each of them a prompt and how to continue it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.engine.completion import Job
from nanoflow_backend.request import exact_json
from nanoflow_backend.request.exact_json import InexactJson
from nanoflow_backend.request.sampling_params import InvalidRequest, SamplingParams

UTF8_MARK, UTF16_MARKS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
DIGEST_BYTES = 8  # tells a changed line from the same one; nothing here is secret


class JobLine(msgspec.Struct, frozen=True):
    """One line of the input, read.

    Attributes:
        number: from 0, blank lines not counted: the line of the output that has its result.
        place: from 1, blank lines counted, as an editor shows it.
        id: the line's own; `number` where it has none.
        digest: changes with every byte of the line, but for white space around it.
        job: prompt and sampling parameters; or what is wrong with the line.
    """

    number: int
    place: int
    id: Any
    digest: str
    job: Job | InvalidRequest


class LineRange(msgspec.Struct, frozen=True):
    """Neighbouring lines of a file: `lines` of them that are not blank, the first of which is `number`."""

    start: int  # byte of the file
    number: int
    lines: int


class JobFile:
    """The lines of one input, which may be a pipe. They are read one by one and not kept."""

    def __init__(self, path: Path) -> None:
        """Raises: ConfigError, where there is no file that could be read."""
        self.path = path
        try:
            if path.is_file():
                with path.open("rb") as file:
                    self._refuse_utf16(file.read(2))
            elif path.is_dir() or not path.exists():
                path.open("rb").close()
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from None

    def count(self) -> int | None:
        """How many lines there are, for those who wait; None for a pipe, which can be read but once."""
        if not self.path.is_file():
            return None
        with self.path.open("rb") as file:
            return sum(1 for text in self._texts(file) if text)

    def lines(self) -> Iterator[JobLine]:
        """Every line that is not blank, bad ones too. Raises: ConfigError, where reading fails."""
        number = 0
        try:
            with self.path.open("rb") as file:
                for place, text in enumerate(self._texts(file), 1):
                    if text:
                        yield parse_line(text, number, place)
                        number += 1
        except OSError as error:
            raise ConfigError(f"{self.path}: {error.strerror}") from None

    def ranges(self, first: int, lines_each: int) -> list[LineRange]:
        """All lines from number `first` on, cut into ranges that `read` can read apart from each other.

        Raises: ConfigError, where the input is no regular file, or reading fails.
        """
        if not self.path.is_file():
            raise ConfigError(f"{self.path}: expected a regular file, for parts of it are read apart")
        ranges: list[LineRange] = []
        number = start = 0
        try:
            with self.path.open("rb") as file:
                for text in file:
                    if (text if start else text.removeprefix(UTF8_MARK)).strip():
                        if number >= first and (number - first) % lines_each == 0:
                            ranges.append(LineRange(start, number, 0))
                        if ranges:
                            ranges[-1] = LineRange(ranges[-1].start, ranges[-1].number, ranges[-1].lines + 1)
                        number += 1
                    start += len(text)
        except OSError as error:
            raise ConfigError(f"{self.path}: {error.strerror}") from None
        return ranges

    def read(self, part: LineRange) -> Iterator[tuple[int, bytes]]:
        """The number and the text of each line of a range. Raises: ConfigError, where reading fails."""
        number, end = part.number, part.number + part.lines
        try:
            with self.path.open("rb") as file:
                file.seek(part.start)
                for text in self._texts(file, part.start):
                    if number == end:
                        return
                    if text:
                        yield number, text
                        number += 1
        except OSError as error:
            raise ConfigError(f"{self.path}: {error.strerror}") from None
        if number < end:
            raise ConfigError(f"{self.path}: has fewer lines than when the run began")

    def _texts(self, file: BinaryIO, start: int = 0) -> Iterator[bytes]:
        """The lines from where the file is, which is byte `start`, without white space around them."""
        if start == 0:
            first = file.readline()
            self._refuse_utf16(first)
            yield first.removeprefix(UTF8_MARK).strip()
        for text in file:
            yield text.strip()

    def _refuse_utf16(self, start: bytes) -> None:
        if start.startswith(UTF16_MARKS):
            raise ConfigError(f"{self.path}: expected UTF-8, got UTF-16 (by its byte order mark)")


def parse_line(text: bytes, number: int, place: int) -> JobLine:
    """Read the JSON object of one line; what is wrong with it becomes its `job`."""
    digest = hashlib.blake2b(text, digest_size=DIGEST_BYTES).hexdigest()
    try:
        fields = msgspec.convert(exact_json.loads(text.decode()), dict[str, Any])
    except (InexactJson, UnicodeDecodeError, msgspec.ValidationError) as error:
        return JobLine(number, place, number, digest, InvalidRequest(f"expected a JSON object: {error}"))
    id = fields.pop("id", number)
    if isinstance(id, Decimal):  # the output's readers would take it for this one
        id = float(id)
    try:
        return JobLine(number, place, id, digest, _job(fields))
    except InvalidRequest as error:
        return JobLine(number, place, id, digest, error)


def _job(fields: dict[str, Any]) -> Job:
    text, token_ids = fields.pop("prompt", None), fields.pop("prompt_token_ids", None)
    if (text is None) == (token_ids is None):
        raise InvalidRequest("expected either prompt or prompt_token_ids")
    try:
        prompt = msgspec.convert(text, str) if token_ids is None else msgspec.convert(token_ids, list[int])
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"{'prompt_token_ids' if text is None else 'prompt'}: {error}") from None
    params = SamplingParams.parse(fields)
    if params.n != 1:
        raise InvalidRequest(f"n: expected 1, for every line has one result, got {params.n}")
    return prompt, params
