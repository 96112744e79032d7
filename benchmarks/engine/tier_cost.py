"""What tiers cost when nothing comes back: tokens/s and joules a token with pages going to host memory, and without.

Two engines of one process share a card, and have as many requests as they take; one computes while the other waits, in
turns A B B A, so that a clock or a temperature that drifts changes both by the same.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import typer
from nanoflow_search.emit.statistics import STUDENT, Gain

from nanoflow_backend.bench import result
from nanoflow_backend.bench.host_memory import wait_for_host_memory
from nanoflow_backend.commands.settings import make_engine
from nanoflow_backend.engine import Engine, SamplingParams
from nanoflow_backend.offline.output import check_output
from nanoflow_backend.request.request import Request
from nanoflow_backend.runtime.gpu_meter import find_gpu_meter
from nanoflow_backend.runtime.page_copies import PAGES_A_LAUNCH, CudaPageCopies, How

QUEUED = 32  # requests that wait: some are always there to be admitted
SETTLE_S = 1.0  # of a window, before it counts: the other engine's step and copies end, batches are in flight again
LEAST_WINDOW_S = 2.0


class Window(NamedTuple):
    """What one engine did while it had the card."""

    seconds: float
    tokens: int  # of prompts and outputs, computed
    energy_j: float | None  # None: nobody measures it
    stored_bytes: int  # to host memory

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def j_per_token(self) -> float | None:
        return None if self.energy_j is None else self.energy_j / self.tokens


class Busy:
    """An engine whose queue is never empty: greedy requests of one length, no two alike."""

    def __init__(self, engine: Engine, input_tokens: int, output_tokens: int, seed: int) -> None:
        self.engine = engine
        self._lengths = input_tokens, output_tokens
        self._draw = random.Random(f"tier-cost {seed}")
        self._numbers = itertools.count()
        self._vocabulary = range(engine.model_config.vocab_size)
        self._meter = find_gpu_meter()
        cache_tokens = engine.executor.num_pages * engine.config.page_tokens
        self._held = min(engine.config.max_running, cache_tokens // (input_tokens + output_tokens // 2))

    def warm_up(self) -> None:
        """Until half as many again have ended as the engine holds at a time; the first were of all lengths, so that
        requests do not begin and end all at once."""
        ended = 0
        while ended < 1.5 * self._held:
            ended += self._step()

    def measure(self, seconds: float) -> Window:
        """Run for so long, after SETTLE_S."""
        self._run(SETTLE_S)
        before = self._meter.read() if self._meter else None
        start_s, stored_bytes = time.perf_counter(), self._stored_bytes
        tokens = self._run(seconds)
        seconds = time.perf_counter() - start_s
        energy_j = self._meter.read().energy_j - before.energy_j if self._meter and before else None
        return Window(seconds, tokens, energy_j, self._stored_bytes - stored_bytes)

    @property
    def _stored_bytes(self) -> int:
        tiers = self.engine.scheduler.stats.tiers
        return tiers.moved_bytes["store"] if tiers else 0

    def _run(self, seconds: float) -> int:
        """Returns tokens that were computed."""
        until_s, tokens = time.perf_counter() + seconds, 0
        while time.perf_counter() < until_s:
            self._step()
            tokens += self.engine.last_batch.tokens if self.engine.last_batch else 0
        return tokens

    def _step(self) -> int:
        """Returns requests that ended."""
        input_tokens, output_tokens = self._lengths
        while self.engine.scheduler.waiting < QUEUED and self.engine.has_room():
            number = next(self._numbers)
            wanted = self._draw.randint(1, output_tokens) if number < self._held else output_tokens
            params = SamplingParams(max_tokens=wanted, ignore_eos=True, temperature=0.0)
            self.engine.add(Request(number, self._draw.choices(self._vocabulary, k=input_tokens), params))
        return sum(delta.finish_reason is not None for delta in self.engine.step())


def main(
    model: Annotated[Path, typer.Option(help="A folder with a Hugging Face config.json.")],
    host_gib: Annotated[float, typer.Option(help="Of host memory; pinning takes half a second a GiB.")] = 32.0,
    disk: Annotated[Path | None, typer.Option(help="A folder for a disk tier below that; left as it is.")] = None,
    disk_gib: Annotated[float, typer.Option(help="That it may take.")] = 64.0,
    copies: Annotated[How, typer.Option(help="A GPU's pages go by a kernel, or by copy engines.")] = "kernel",
    pages_a_launch: Annotated[int, typer.Option(min=1, help="Of that kernel.")] = PAGES_A_LAUNCH,
    workload: Annotated[str, typer.Option(help="PROMPT/OUTPUT tokens of each request.")] = "1024/512",
    pairs: Annotated[int, typer.Option(min=2, max=len(STUDENT) + 1, help="Of windows, with tiers and without.")] = 4,
    window_s: Annotated[float, typer.Option(min=LEAST_WINDOW_S, help="That a window is measured.")] = 60.0,
    limit_s: Annotated[float, typer.Option(help="For everything: windows become shorter if they have to.")] = math.inf,
    setting: Annotated[list[str] | None, typer.Option("--set", help="FIELD=VALUE of engine.json, of both.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where the JSON result goes; default: standard output.")] = None,
) -> None:
    """Measure A B B A what it costs to store every page that is filled, on a GPU that holds two engines."""
    start_s = time.monotonic()
    if output:
        check_output(output)
    for option, value in (("--host-gib", host_gib), ("--disk-gib", disk_gib)):
        if not 0 < value < math.inf:
            raise typer.BadParameter(f"expected a finite number above 0, got {value:g}", param_hint=option)
    input_tokens, output_tokens = _lengths(workload)
    below = [f"host_kv_cache_bytes={int(host_gib * 2**30)}"]
    if disk:
        below.append(f'disk_kv_cache={{"path": "{disk}", "bytes": {int(disk_gib * 2**30)}}}')
    arms = {
        name: Busy(make_engine(model, [*(setting or ()), *more], max_queue_size=str(2 * QUEUED)), *lengths)
        for name, more, lengths in (
            ("without", [], (input_tokens, output_tokens, 0)),
            ("tiers", below, (input_tokens, output_tokens, 1)),
        )
    }
    tiers = arms["tiers"].engine
    wait_for_host_memory(tiers)
    if tiers.config.device == "cuda":
        worker = tiers.executor.worker
        pool = worker.transfers.pool
        worker.transfers.copies = CudaPageCopies(worker.program.binding.kv, pool, copies, pages_a_launch)
    for arm in arms.values():
        arm.warm_up()
    left_s = (limit_s - (time.monotonic() - start_s)) / (2 * pairs) - SETTLE_S
    if not left_s >= LEAST_WINDOW_S:  # nor if it is no number
        raise typer.BadParameter(
            f"expected {LEAST_WINDOW_S:g} s for each of {2 * pairs} windows, {left_s:.1f} s are left after the start",
            param_hint="--limit-s",
        )
    window_s = min(window_s, left_s)
    windows: list[dict[str, Any]] = []
    for turn in range(pairs):
        for name in ("without", "tiers") if turn % 2 == 0 else ("tiers", "without"):
            window = arms[name].measure(window_s)
            windows.append({"arm": name, **_rates(window)})
            print(windows[-1], flush=True)
    result.write(
        {
            **result.engine_facts(tiers),
            "workload": workload,
            "copies": copies,
            "pages_a_launch": pages_a_launch,
            "window_s": round(window_s, 2),
            "settle_s": SETTLE_S,
            "with_tiers_over_without": compare(windows),
            "windows": windows,
            "tiers": msgspec.to_builtins(tiers.scheduler.stats.tiers),  # with the warm-up
        },
        output,
    )
    for arm in arms.values():
        arm.engine.close()


def compare(windows: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Of each pair of windows with tiers over that without: the geometric mean, and both ends of its 95 % interval."""
    ratios = {}
    for figure in ("tokens_per_s", "j_per_token"):
        of = {name: [w[figure] for w in windows if w["arm"] == name] for name in ("tiers", "without")}
        if None not in of["tiers"]:
            logs = [math.log(a / b) for a, b in zip(of["tiers"], of["without"], strict=True)]
            ratios[figure] = [round(value, 5) for value in Gain.of(logs)]
    return ratios


def _rates(window: Window) -> dict[str, float | None]:
    energy = window.j_per_token
    return {
        "seconds": round(window.seconds, 3),
        "tokens": window.tokens,
        "tokens_per_s": round(window.tokens_per_s, 1),
        "j_per_token": None if energy is None else round(energy, 6),
        "stored_gb_per_s": round(window.stored_bytes / window.seconds / 1e9, 4),
    }


def _lengths(workload: str) -> tuple[int, int]:
    lengths = workload.split("/")
    if len(lengths) != 2 or not all(length.isdecimal() and int(length) > 0 for length in lengths):
        raise typer.BadParameter(f"expected PROMPT/OUTPUT such as 1024/512, got {workload}", param_hint="--workload")
    return int(lengths[0]), int(lengths[1])
