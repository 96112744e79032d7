"""nanoflow batch: a file of prompts to a file of completions, line for line."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nanoflow_backend.commands.settings import make_engine
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.engine import Completion, Engine, SamplingParams
from nanoflow_backend.engine.completion import Job
from nanoflow_backend.request.sampling_params import InvalidRequest


class Line(msgspec.Struct, frozen=True):
    """One line of the input, read: a job, or what is wrong with it."""

    id: Any
    job: Job | None = None
    error: str | None = None


def batch(model: Path, input: Path, output: Path, settings: Sequence[str]) -> int:
    """How many lines of the output are errors, those of runs that this one continues too.

    Raises: ConfigError when a file cannot be read or written, or the output does not continue this input.
    """
    try:
        lines = [parse_line(text, number) for number, text in enumerate(input.read_bytes().splitlines())]
        output.touch()
        if output.samefile(input):
            raise ConfigError(f"{output}: expected another file than the input")
        done, failed = resume(output, lines)
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from None
    engine = make_engine(model, settings)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with output.open("ab") as file, Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("completions", total=len(lines), completed=done)
        for result in in_order(engine, lines[done:]):
            file.write(msgspec.json.encode(result) + b"\n")
            file.flush()
            failed += "error" in result
            progress.advance(task)
    engine.close()
    print(f"nanoflow: {len(lines) - failed} lines done, {failed} failed", file=sys.stderr)
    return failed


def parse_line(text: bytes, number: int) -> Line:
    """A line without an id has its number, from 0."""
    try:
        fields = msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return Line(number, error=f"expected a JSON object: {error}")
    id = fields.pop("id", number)
    text_prompt, token_ids = fields.pop("prompt", None), fields.pop("prompt_token_ids", None)
    if (text_prompt is None) == (token_ids is None):
        return Line(id, error="expected either prompt or prompt_token_ids")
    try:
        prompt: str | list[int] = (
            msgspec.convert(text_prompt, str) if token_ids is None else msgspec.convert(token_ids, list[int])
        )
        return Line(id, job=(prompt, single(SamplingParams.parse(fields))))
    except msgspec.ValidationError as error:
        return Line(id, error=f"{'prompt_token_ids' if text_prompt is None else 'prompt'}: {error}")
    except InvalidRequest as error:
        return Line(id, error=str(error))


def single(params: SamplingParams) -> SamplingParams:
    if params.n != 1:
        raise InvalidRequest(f"n: expected 1, for every line has one result, got {params.n}")
    return params


def resume(output: Path, lines: list[Line]) -> tuple[int, int]:
    """How many lines a run before this one has finished, and how many of these are errors.

    What a kill left of another is cut off.
    """
    text = output.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    finished = whole.splitlines()
    failed = 0
    for number, (result, line) in enumerate(zip(finished, lines, strict=False)):
        try:
            fields = msgspec.json.decode(result, type=dict[str, Any])
            continues = fields.get("id") == line.id
            failed += "error" in fields
        except (msgspec.DecodeError, UnicodeDecodeError):
            continues = False
        if not continues:
            raise ConfigError(
                f"{output}: line {number} is not the result of the input's line {number} (id {line.id!r})"
            )
    if len(finished) > len(lines):
        raise ConfigError(f"{output}: has {len(finished)} lines, the input only {len(lines)}")
    os.truncate(output, len(whole))  # not rewritten: another kill must not cost what is finished
    return len(finished), failed


def in_order(engine: Engine, lines: list[Line]) -> Iterator[dict[str, Any]]:
    """The lines' results in the order of the lines; what ends early waits for those before it."""
    numbers = [number for number, line in enumerate(lines) if line.job]
    results = {number: {"id": line.id, "error": line.error} for number, line in enumerate(lines) if not line.job}
    jobs = engine.complete(line.job for line in lines if line.job)
    for number in range(len(lines)):
        while number not in results:
            job, result = next(jobs)
            results[numbers[job]] = describe(lines[numbers[job]].id, result)
        yield results.pop(number)


def describe(id: Any, result: Completion | InvalidRequest) -> dict[str, Any]:
    if isinstance(result, InvalidRequest):
        return {"id": id, "error": str(result)}
    return {
        "id": id,
        "text": result.text,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "num_input_tokens": result.num_input_tokens,
        "num_output_tokens": len(result.token_ids),
    }
