"""The null engine is a real one whose device costs nothing: a step takes as long as one says.

Scheduler, worker, loop and socket are the real ones; the program does nothing. Tokens are made up: the id of one is the
millisecond in which the host got it, so whoever reads it later knows how long it was on its way.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import torch

from nanoflow_backend.config.settled import Settled
from nanoflow_backend.engine import loop
from nanoflow_backend.engine.local_executor import LocalExecutor
from nanoflow_backend.engine.worker import InFlightStep
from nanoflow_backend.runtime.binding import FittedPlan
from nanoflow_backend.runtime.program import Program
from nanoflow_backend.scheduler.batch import Batch, Sampled

CYCLE_MS = 2000  # of the clock that token ids tell; the vocabulary has to be larger
FIRST_ID = 3  # no special token of the demo model


def made_now() -> int:
    """The id of a token that the host gets at this moment."""
    return FIRST_ID + int(time.monotonic() * 1e3) % CYCLE_MS


def age_ms(token_id: int) -> int:
    """How long ago `made_now` said so; below CYCLE_MS."""
    return (made_now() - token_id) % CYCLE_MS


class NullProgram:
    """A Program that chooses plans as `program` does, and whose every row has the same logits."""

    def __init__(self, program: Program, rows: int) -> None:
        self._program = program
        columns = 8  # sampling from a vocabulary is the device's work
        self.logits = torch.zeros(rows, columns).index_fill(1, torch.tensor([3]), 1.0)

    def plan_for(self, tokens: int, decode_kv_tokens: int) -> FittedPlan:
        return self._program.plan_for(tokens, decode_kv_tokens)

    def forward(self, *inputs: torch.Tensor) -> None: ...

    def head(self, rows: torch.Tensor) -> torch.Tensor:
        return self.logits[: len(rows)]

    def fill(self, page_table: torch.Tensor) -> None: ...

    def warm_up(self, page_table: torch.Tensor) -> None: ...


class NullExecutor(LocalExecutor):
    """An Executor whose worker is real but for its NullProgram.

    Steps take `step_us` one after the other, as on a device; `collect` waits for their end.
    """

    def __init__(self, settled: Settled, on_rank_death: Callable[[str], None], *, step_us: int) -> None:
        super().__init__(settled, on_rank_death)
        self.worker.program = NullProgram(self.worker.program, settled.config.dense_batch_tokens)
        self._step_s = step_us / 1e6
        self._idle_from_s = 0.0  # the device, once all that was launched is done
        self._ends_s: list[float] = []  # of the steps in flight

    def launch_forward(self, batch: Batch) -> InFlightStep:
        self._idle_from_s = max(self._idle_from_s, time.monotonic()) + self._step_s
        self._ends_s.append(self._idle_from_s)
        return super().launch_forward(batch)

    def collect(self, step: InFlightStep) -> Sampled:
        sampled = super().collect(step)
        time.sleep(max(0.0, self._ends_s.pop(0) - time.monotonic()))
        return msgspec.structs.replace(sampled, token_ids=[made_now()] * len(sampled.token_ids))


def write_interpreter(path: Path, step_us: int, first: str = "") -> Path:
    """An executable for the `python` of an engine.json: whatever module it is told to run, it runs this engine.

    `first`: a line of Python before that.
    """
    path.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path[:0] = {[folder for folder in sys.path if folder]!r}\n"
        f"{first}\nfrom benchmarks.engine import null_engine\nnull_engine.main({step_us})\n"
    )
    path.chmod(0o755)
    return path


def main(step_us: int) -> None:
    sys.argv[1:] = [word for word in sys.argv[1:] if word.isdigit()]  # not "-P -m module"
    loop.main(partial(NullExecutor, step_us=step_us))
