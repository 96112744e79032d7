"""Conversations through an engine with host memory and a disk, which is killed again and again: answers stay the same.

Every life of the engine has the same conversations, a folder that the one before has left as SIGKILL found it, and
bounds that are too small for all. What it answers is compared with an engine that has no cache at all.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from benchmarks.server import DEMO_MODEL
from nanoflow_backend.bench import result
from nanoflow_backend.bench.multi_round.conversations import Conversations, draw_conversations
from nanoflow_backend.bench.multi_round.driver import AnsweredRound, Driver
from nanoflow_backend.kvcache.disk.page_file import PageLayout
from nanoflow_backend.kvcache.disk.page_folder import PageFolder

CONVERSATIONS, ACTIVE, SCALE = 16, 4, 0.25
DISK_BYTES = 6_000_000
SETTINGS: dict[str, Any] = {
    "kv_cache_tokens": 640,
    "page_tokens": 16,
    "max_model_tokens": 320,
    "max_queue_size": ACTIVE,
    "host_kv_cache_bytes": 2_000_000,
}
ROOT = Path(__file__).parents[2]
LIFE = "from benchmarks.stress.tier_soak import live; import sys; live(sys.argv[1])"
START_S = 120.0  # until the first answer of a life


def main(
    minutes: float = 20.0,
    seed: int = 0,
    output: Annotated[Path | None, typer.Option(help="Where the JSON result goes; default: standard output.")] = None,
) -> None:
    """Kill an engine with tiers again and again; exits with 1 if an answer changed, or a restart found nothing."""
    report = soak(60 * minutes, seed)
    result.write(report, output)
    sys.exit(bool(report["failures"]))


def soak(seconds: float, seed: int) -> dict[str, Any]:
    """Returns what became of it, with `failures`: what must not have."""
    expected = reference()
    draw, start_s = random.Random(seed), time.monotonic()
    lives: list[dict[str, int]] = []
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        while not lives or time.monotonic() - start_s < seconds:
            number = len(lives)
            answered, ended = _one_life(folder, lives_s=draw.uniform(2, 20))
            tokens = Counter[str]()
            for answer in answered:
                tokens += Counter(rounds=1, host_tokens=answer.host_tokens, disk_tokens=answer.disk_tokens)
                if answer.answer != expected[answer.conversation, answer.number]:
                    failures.append(f"life {number}: conversation {answer.conversation}, round {answer.number} differs")
            lives.append(dict(tokens))
            failures += [f"life {number}: {fault}" for fault in ended + _faults_of(Path(folder))]
            if number and not tokens["disk_tokens"]:
                failures.append(f"life {number}: expected pages of the disk, found none in {tokens['rounds']} rounds")
            print(f"life {number}: {dict(tokens)}", flush=True)
    return {
        "model": DEMO_MODEL.name,
        "settings": SETTINGS | {"disk_kv_cache": {"bytes": DISK_BYTES}},
        "conversations": CONVERSATIONS,
        "minutes": round((time.monotonic() - start_s) / 60, 1),
        "kills": len(lives),
        "rounds": sum(life.get("rounds", 0) for life in lives),
        "host_tokens": sum(life.get("host_tokens", 0) for life in lives),
        "disk_tokens": sum(life.get("disk_tokens", 0) for life in lives),
        "failures": failures,
    }


def reference() -> dict[tuple[int, int], list[int]]:
    """The answers of an engine that computes everything, by conversation and round."""
    answers: dict[tuple[int, int], list[int]] = {}

    def keep(answered: AnsweredRound) -> None:
        answers[answered.conversation, answered.number] = answered.answer

    _drive(SETTINGS | {"host_kv_cache_bytes": 0, "prefix_caching": False}, keep, once=True)
    return answers


def live(folder: str) -> None:
    """One life, in a process of its own: a line for each answer, until it is killed."""

    def tell(answered: AnsweredRound) -> None:
        print(msgspec.json.encode(answered).decode(), flush=True)

    _drive(SETTINGS | {"disk_kv_cache": {"path": folder, "bytes": DISK_BYTES}}, tell, once=False)


def _drive(settings: dict[str, Any], tell: Any, once: bool) -> None:
    from nanoflow_backend.engine import Engine

    engine = Engine.from_pretrained(str(DEMO_MODEL), **settings)
    drawn: Conversations = draw_conversations(
        "lmsys-like", CONVERSATIONS, engine.max_model_tokens, think_s=0, scale=SCALE
    )
    while True:
        driver = Driver(drawn, ACTIVE, engine.model_config.vocab_size, on_answer=tell)
        driver.run(engine, time.perf_counter, time.sleep)
        if once:
            return engine.close()


def _one_life(folder: str, lives_s: float) -> tuple[list[AnsweredRound], list[str]]:
    """Start an engine, and kill it so many seconds after its first answer. Returns answers, and faults."""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    engine = subprocess.Popen(
        [sys.executable, "-c", LIFE, folder],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
    )
    assert engine.stdout is not None
    killer, answered = threading.Timer(START_S, engine.kill), []
    killer.start()
    for line in engine.stdout:
        if not answered:
            killer.cancel()
            killer = threading.Timer(lives_s, engine.kill)
            killer.start()
        if line.endswith(b"\n"):  # the kill may have cut it
            answered.append(msgspec.json.decode(line, type=AnsweredRound))
    killer.cancel()
    ended = engine.wait()
    faults = [] if ended == -9 else [f"expected a process that only SIGKILL ends, it ended with {ended}"]
    return answered, faults + ([] if answered else [f"no answer within {START_S:g} s"])


def _faults_of(folder: Path) -> list[str]:
    """What the kill left in the folder that it must not."""
    files_bytes = sum(file.stat().st_size for file in folder.glob("*.*"))
    faults = [] if files_bytes <= DISK_BYTES else [f"expected {DISK_BYTES} bytes at most, found {files_bytes}"]
    neighbour = PageLayout("another", "", "", page_tokens=1, rank=0, world=1, payload_bytes=1)
    PageFolder(folder, DISK_BYTES, neighbour).scan()
    return faults + [f"{file.name} is left of a dead process" for file in folder.glob("*.tmp")]
