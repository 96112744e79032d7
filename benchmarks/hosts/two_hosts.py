"""One engine on two hosts: the tokens of one rank, who is refused, and what it takes to notice and to mend a fault."""

from __future__ import annotations

import functools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.hosts.group import Group
from benchmarks.hosts.leader import TOKENS
from benchmarks.hosts.namespaces import two_hosts
from benchmarks.server import DEMO_MODEL
from nanoflow_backend.bench import result
from nanoflow_backend.engine import LLM, SamplingParams
from nanoflow_backend.hosts.link import LOST_S, PING_S

SETTINGS: dict[str, Any] = {"kv_cache_tokens": 8192, "dense_batch_tokens": 128, "max_engine_restarts": 20}
REQUESTS, PROMPT_TOKENS = 32, 64
LIMIT_S = 10.0
LONG_TOKENS, INTO_WORK_S = 400, 0.3  # of requests that are in the way of a fault


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Of each fault.")] = 3,
    output: Annotated[Path | None, typer.Option(help="Where the JSON result goes; default: standard output.")] = None,
) -> None:
    """One engine on two hosts; exits with 1 if a token differs, or a fault is not noticed within 10 s."""
    report = run(rounds, functools.partial(print, flush=True))
    result.write(report, output)
    sys.exit(bool(report["failures"]))


def run(rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Seconds from each fault until the leader has said it, and from its end until an engine is ready again: that has
    the supervisor's pause in it, of 1, 2 and 4 s."""
    rng = random.Random(7)
    prompts = [[rng.randrange(256) for _ in range(rng.randint(1, PROMPT_TOKENS))] for _ in range(REQUESTS)]
    expected = _of_one_rank(prompts)
    noticed: dict[str, list[float]] = {fault: [] for fault in FAULTS}
    again: dict[str, list[float]] = {fault: [] for fault in FAULTS}
    failures: list[str] = []
    compared = 0

    def compare(group: Group, when: str) -> None:
        nonlocal compared
        compared += sum(map(len, expected))
        if group.complete(prompts) != expected:
            failures.append(f"tokens {when}")

    with tempfile.TemporaryDirectory() as name, two_hosts() as hosts:
        copy = Path(name, "copy")
        shutil.copytree(DEMO_MODEL, copy)
        for number in range(rounds):
            folder = Path(name, str(number))
            folder.mkdir()
            with Group(folder, DEMO_MODEL, copy, hosts, **SETTINGS) as group:
                refused = group.join_with_another_secret().splitlines()[-1]
                if "another secret" not in refused:
                    failures.append(f"another secret: {refused}")
                group.join()
                group.wait_for("ready")
                say(f"ready on {hosts.kind}; {refused}")
                for fault, make in FAULTS.items():
                    compare(group, f"before: {fault}")
                    make(group, prompts)
                    began_s = time.monotonic()
                    how = group.wait_for("death")["how"]
                    noticed[fault].append(time.monotonic() - began_s)
                    say(f"{fault}: {how}")
                    if noticed[fault][-1] > LIMIT_S or "host 1 (" not in how or "rank 1" not in how:
                        failures.append(f"{fault}: after {noticed[fault][-1]:.1f} s: {how}")
                    group.mend()
                    began_s = time.monotonic()
                    group.wait_for("again", timeout_s=120.0)
                    again[fault].append(time.monotonic() - began_s)
                compare(group, "at the end")
    return {
        "hosts": hosts.kind,
        "settings": SETTINGS,
        "requests": REQUESTS,
        "another_secret": refused,
        "ping_s": PING_S,
        "lost_s": LOST_S,
        "rounds": rounds,
        "load_average": round(os.getloadavg()[0], 1),
        "tokens_compared": compared,
        "noticed_s": {fault: [round(s, 2) for s in times] for fault, times in noticed.items()},
        "serving_again_s": {fault: [round(s, 2) for s in times] for fault, times in again.items()},
        "failures": failures,
    }


def _of_one_rank(prompts: list[list[int]]) -> list[list[int]]:
    llm = LLM.from_pretrained(DEMO_MODEL, device="cpu", **SETTINGS)
    params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    tokens = [completion.token_ids for completion in llm.generate(prompts, params)]
    llm.close()
    return tokens


def _cut_idle(group: Group, prompts: list[list[int]]) -> None:
    group.cut()


def _cut_busy(group: Group, prompts: list[list[int]]) -> None:
    group.submit(prompts, LONG_TOKENS)
    time.sleep(INTO_WORK_S)
    group.cut()


def _kill_rank(group: Group, prompts: list[list[int]]) -> None:
    group.submit(prompts, LONG_TOKENS)
    time.sleep(INTO_WORK_S)
    for rank in Path(f"/proc/{group.other_pid}/task").glob("*/children"):
        for pid in rank.read_text().split():
            os.kill(int(pid), signal.SIGKILL)


FAULTS = {
    "link cut while idle": _cut_idle,
    "link cut under load": _cut_busy,
    "rank killed under load": _kill_rank,
}
