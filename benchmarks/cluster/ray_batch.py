"""Batches on a Ray cluster of three nodes: against as many processes on their own, and through kills."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.cluster.local_cluster import LocalCluster
from benchmarks.cluster.sleeping_batch import SETTINGS
from benchmarks.serving.server_state import processes
from nanoflow_backend.bench import result

NODES = 3
PROMPT_TOKENS, OUTPUT_TOKENS = 16, (4, 12)
FASTER = 3  # steps of the run with kills, whose time is no result
POLL_S = 0.2
PATIENCE_S = 600.0
STEADY = (0.1, 0.9)  # of the lines: what comes between says how fast it goes once it goes
MOST_OVERHEAD, MOST_GROWTH_MIB = 0.05, 16.0
ROLES = {"command": "benchmarks.cluster.sleeping_batch", "job": "ray::Job", "engine": "ray::MapWorker"}


def main(
    lines: int = 50_000,
    replicas: Annotated[int, typer.Option(min=2)] = NODES,
    step_ms: Annotated[float, typer.Option(help="Of the engines, whose program sleeps instead of computing.")] = 100.0,
    output: Annotated[Path | None, typer.Option(help="Where the JSON result goes; default: standard output.")] = None,
) -> None:
    """`nanoflow batch --cluster` on three nodes of this machine; exits with 1 if it is not as it should be.

    A run that loses a node and two engines must write what one process writes, byte for byte; one that is left alone
    may take 5 % longer than as many processes with a part of the lines each, and its memory must not grow.
    """
    begin_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = measure(Path(folder), lines, replicas, step_ms / 1e3)
    report["minutes"] = round((time.monotonic() - begin_s) / 60, 2)
    result.write(report, output)
    print(f"{report['minutes']} minutes; failures: {report['failures']}", file=sys.stderr)
    sys.exit(bool(report["failures"]))


def measure(folder: Path, lines: int, replicas: int, step_s: float) -> dict[str, Any]:
    source = write_input(folder / "in.jsonl", lines)
    alone = Watched([start(0.0, source, folder / "alone.jsonl")], [folder / "alone.jsonl"], lines)
    alone.watch()
    expected = (folder / "alone.jsonl").read_bytes()
    parts = cut(source, replicas)
    outputs = [part.with_suffix(".out") for part in parts]
    apart = Watched([start(step_s, *paths) for paths in zip(parts, outputs, strict=True)], outputs, lines)
    apart.watch()
    with LocalCluster(nodes=NODES, cpus=2) as cluster:
        joined = run_on(cluster, step_s, source, folder / "joined.jsonl", replicas, lines)
        joined.watch()
        killed = run_on(cluster, step_s / FASTER, source, folder / "killed.jsonl", replicas, lines)
        killed.watch(kills(cluster))
    whole, steady = joined.wall_s / apart.wall_s - 1, joined.steady_s / apart.steady_s - 1
    same = {
        "apart": b"".join(path.read_bytes() for path in outputs) == expected,
        "on the cluster": (folder / "joined.jsonl").read_bytes() == expected,
        "through kills": (folder / "killed.jsonl").read_bytes() == expected,
    }
    failures = [f"{run}: the output is not that of one process" for run, is_same in same.items() if not is_same]
    failures += [f"through kills: {what}" for what in killed.problems]
    failures += [f"overhead: {whole:.1%} of the whole run"] * (whole > MOST_OVERHEAD)
    growth = joined.growth_mib()
    failures += [f"{role}: memory grew by {mib} MiB" for role, mib in growth.items() if mib > MOST_GROWTH_MIB]
    return {
        "lines": lines,
        "prompt_tokens": PROMPT_TOKENS,
        "output_tokens": list(OUTPUT_TOKENS),
        "nodes": NODES,
        "replicas": replicas,
        "step_ms": step_s * 1e3,
        "settings": SETTINGS,
        "overhead": {"whole": round(whole, 4), "steady": round(steady, 4)},
        "apart": apart.report(),
        "on_the_cluster": {**joined.report(), "memory_mib": joined.memory_mib(), "memory_growth_mib": growth},
        "through_kills": {**killed.report(), "step_ms": round(step_s / FASTER * 1e3, 1), "killed": killed.done},
        "same_output": same,
        "failures": failures,
    }


class Watched:
    """Processes that write outputs, with the time at which each share of the lines was there, and their memory."""

    def __init__(self, commands: Sequence[subprocess.Popen[bytes]], outputs: Sequence[Path], lines: int) -> None:
        self._commands, self._outputs, self._lines = commands, outputs, lines
        self._begin_s = time.monotonic()
        self._came: list[tuple[float, int]] = []  # seconds, lines
        self._memory: dict[str, list[tuple[int, float]]] = {}  # of each process: lines, MiB
        self.wall_s = 0.0
        self.done: list[str] = []
        self.problems: list[str] = []

    def watch(self, events: Sequence[tuple[float, str, Callable[[], None]]] = ()) -> None:
        """Until they end. Each event (a share of the lines, a name, what to do) comes when so many lines are there."""
        counts, due = [LineCount(path) for path in self._outputs], list(events)
        while any(command.poll() is None for command in self._commands):
            lines, seconds = sum(count.read() for count in counts), time.monotonic() - self._begin_s
            if seconds > PATIENCE_S:
                raise TimeoutError(f"{lines} of {self._lines} lines after {seconds:.0f} s")
            self._came.append((seconds, lines))
            if len(self._came) % 10 == 0:
                self._sample(lines)
            if due and lines >= due[0][0] * self._lines:
                _, name, act = due.pop(0)
                act()
                self.done.append(f"{name} after {lines} lines")
            time.sleep(POLL_S)
        self.wall_s = time.monotonic() - self._begin_s
        self._came.append((self.wall_s, sum(count.read() for count in counts)))
        self.problems += [f"exit status {code}" for command in self._commands if (code := command.returncode)]
        self.problems += [f"no {name}: the lines were done" for _, name, _ in due]

    @property
    def steady_s(self) -> float:
        """From the first share of STEADY to the second."""
        first, last = (next(at for at, lines in self._came if lines >= share * self._lines) for share in STEADY)
        return last - first

    def report(self) -> dict[str, Any]:
        first_s = next(at for at, lines in self._came if lines)
        steady_rate = (STEADY[1] - STEADY[0]) * self._lines / self.steady_s
        return {
            "wall_s": round(self.wall_s, 1),
            "first_line_s": round(first_s, 1),
            "steady_lines_per_s": round(steady_rate, 1),
        }

    def memory_mib(self) -> dict[str, float]:
        """The most that one process of each role had of its own."""
        return {role: max(mib for samples in found for _, mib in samples) for role, found in self._by_role().items()}

    def growth_mib(self) -> dict[str, float]:
        """The most that one process of each role grew by from a quarter of the lines to the end."""
        return {role: round(max(map(self._growth, found)), 1) for role, found in self._by_role().items()}

    def _growth(self, samples: Sequence[tuple[int, float]]) -> float:
        later = [mib for lines, mib in samples if lines > self._lines / 4]
        return later[-1] - later[0] if later else 0.0

    def _by_role(self) -> dict[str, list[list[tuple[int, float]]]]:
        return {
            role: [samples for name, samples in self._memory.items() if name.startswith(f"{role} ")] for role in ROLES
        }

    def _sample(self, lines: int) -> None:
        for pid, command in processes(1).items():
            role = next((role for role, word in ROLES.items() if word in command), None)
            if role and (mib := own_mib(pid)):
                self._memory.setdefault(f"{role} {pid}", []).append((lines, mib))


class LineCount:
    """Counts the lines of a file that grows."""

    def __init__(self, path: Path) -> None:
        self._path, self._bytes, self._lines = path, 0, 0

    def read(self) -> int:
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._bytes)
                new = file.read()
            self._bytes += len(new)
            self._lines += new.count(b"\n")
        return self._lines


def own_mib(pid: int) -> float:
    """Memory of one process that is not shared; 0 if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    found = re.search(r"RssAnon:\s+(\d+)", status)
    return round(int(found[1]) / 1024, 1) if found else 0.0


def write_input(path: Path, lines: int) -> Path:
    """Each line has an id and a seed of its own, so that its result is the same whatever lines are before it."""
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(lines):
            line = {
                "id": f"line {number}",
                "prompt_token_ids": [draw.randrange(256) for _ in range(PROMPT_TOKENS)],
                "max_tokens": draw.randint(*OUTPUT_TOKENS),
                "seed": number,
                "ignore_eos": True,
            }
            file.write(json.dumps(line) + "\n")
    return path


def cut(source: Path, parts: int) -> list[Path]:
    """Parts of a file with as many lines each, in order."""
    lines = source.read_bytes().splitlines(keepends=True)
    paths = [source.with_name(f"part{number}.jsonl") for number in range(parts)]
    for number, path in enumerate(paths):
        path.write_bytes(b"".join(lines[len(lines) * number // parts : len(lines) * (number + 1) // parts]))
    return paths


def start(step_s: float, source: Path, output: Path, *cluster: str) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "benchmarks.cluster.sleeping_batch", str(step_s), str(source), str(output), *cluster]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def run_on(cluster: LocalCluster, step_s: float, source: Path, output: Path, replicas: int, lines: int) -> Watched:
    return Watched([start(step_s, source, output, cluster.address, str(replicas))], [output], lines)


def kills(cluster: LocalCluster) -> list[tuple[float, str, Callable[[], None]]]:
    return [
        (0.2, "an engine", cluster.kill_engine),
        (0.4, "a node", lambda: cluster.kill_node(NODES - 1)),
        (0.6, "an engine", cluster.kill_engine),
    ]
