"""EngineStage is a stage of Ray Data's map_batches: each of its actors completes lines on an engine of its own."""

from __future__ import annotations

import logging
import os
import queue
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.offline.job_file import JobLine, parse_line
from nanoflow_backend.offline.made_with import MadeWith
from nanoflow_backend.offline.result_line import ResultLine
from nanoflow_backend.offline.run import complete_lines
from nanoflow_backend.process.child import THREADS_SLEEP

if TYPE_CHECKING:
    from nanoflow_backend.engine import LLM, Engine

log = logging.getLogger(__name__)
ENGINE_ENDED = 70  # the actor's exit status
LINES = pa.schema([("number", pa.int64()), ("line", pa.binary())])
RESULTS = pa.schema(
    [
        ("number", pa.int64()),
        ("digest", pa.string()),
        ("result", pa.binary()),
        ("failed", pa.bool_()),
        ("tokens", pa.int64()),
    ]
)
MakeEngine = Callable[[EngineConfig], "Engine"]


class EngineStage:
    """Rows of LINES become rows of RESULTS, in their order.

    A row is a line of `nanoflow batch`'s input as it is, with its number, from which come its default id and, where it
    has none, its seed. `result` is its line of the output, `digest` tells whether the line has changed, `tokens` counts
    what was generated.

    Calls from several threads share the engine: what one of them waits for does not keep it from starting others. An
    engine that fails takes its process with it, so that Ray starts another one and hands it the same rows.

    Args:
        config: of the engine.
        made_with: what the results are expected to be made of; None: whatever is found.
        make_engine: makes it; None: Engine.

    Raises:
        ConfigError, ScheduleError: as Engine, or the model or a setting is not what was expected.
    """

    def __init__(
        self, config: EngineConfig, made_with: MadeWith | None = None, make_engine: MakeEngine | None = None
    ) -> None:
        os.environ |= {**THREADS_SLEEP, **os.environ}  # before torch is imported
        from nanoflow_backend.engine import LLM, Engine  # brings torch: whoever names this class need not have it

        self._batches: queue.SimpleQueue[_Batch] = queue.SimpleQueue()
        self._live = 0  # lines that the engine has
        engine = (make_engine or Engine)(config)
        if made_with and (changes := MadeWith.of(engine.config).changes_from(made_with)):
            raise ConfigError(f"on {os.uname().nodename}: {'; '.join(changes)}. Expected the same on all nodes")
        threading.Thread(target=self._run, args=(LLM(engine), config.seed), name="engine", daemon=True).start()

    def __call__(self, rows: pa.Table) -> pa.Table:
        lines = [
            parse_line(text, number, number + 1)
            for number, text in zip(rows["number"].to_pylist(), rows["line"].to_pylist(), strict=True)
        ]
        batch = _Batch(lines)
        if lines:
            self._batches.put(batch)
            batch.done.wait()
        results = [batch.results[index] for index in range(len(lines))]
        return pa.table(
            {
                "number": [line.number for line in lines],
                "digest": [line.digest for line in lines],
                "result": [result.json for result in results],
                "failed": [result.failed for result in results],
                "tokens": [result.tokens for result in results],
            },
            RESULTS,
        )

    def _run(self, llm: LLM, seed: int) -> None:
        try:
            for _ in complete_lines(self._lines(), llm, self._put, seed):
                pass
        except BaseException:
            log.error("the engine failed, and ends its process:\n%s", traceback.format_exc())
        finally:
            os._exit(ENGINE_ENDED)  # nothing less would end the calls that wait

    def _lines(self) -> Iterator[tuple[_Place, JobLine] | None]:
        while True:
            try:
                batch = self._batches.get(block=not self._live)
            except queue.Empty:
                yield None
                continue
            for index, line in enumerate(batch.lines):
                self._live += 1
                yield _Place(batch, index), line

    def _put(self, place: _Place, result: ResultLine) -> None:
        self._live -= 1
        place.batch.put(place.line, result)


class _Batch:
    """What one call waits for."""

    def __init__(self, lines: list[JobLine]) -> None:
        self.lines = lines
        self.results: dict[int, ResultLine] = {}  # by index of the line
        self.done = threading.Event()

    def put(self, index: int, result: ResultLine) -> None:
        self.results[index] = result
        if len(self.results) == len(self.lines):
            self.done.set()


class _Place(NamedTuple):
    batch: _Batch
    line: int  # its index there
