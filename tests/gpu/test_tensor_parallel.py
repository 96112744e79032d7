"""Tensor parallel on one GPU: its ranks are processes that share it, and reach each other's memory as on several.

They are time-sliced, so that a meeting of all ranks takes milliseconds: these tests say right or wrong, not how fast.
Nor do they say anything of orders over NVLink. NCCL refuses two ranks on one GPU.
"""

from __future__ import annotations

import fcntl
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engine.engine_client import Client, config
from support.places import DEMO_MODEL
from support.process_tree import alive, children
from support.waiting import until

from benchmarks.models import checkpoints
from nanoflow_backend.engine import LLM, SamplingParams
from nanoflow_backend.request.request import Request
from nanoflow_backend.runtime.rank_gpu import SHARED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300, func_only=True),
]
OPTIONS: dict[str, Any] = {"device": "cuda", "dense_batch_tokens": 32, "kv_cache_tokens": 4096}
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=2)
TEXTS = ("Return a list of", "The with statement", "This module provides", "Raise an exception if")
# A lane of their own for collectives, where batches are cut into parts.
CASES = [
    *((name, 2, "float32", "nano-batched-2") for name in checkpoints.CONFIGS),
    *((name, 2, "float16", "sequential") for name in checkpoints.OWN_GRAPHS),
    *((name, 4, "float16", "nano-batched-2") for name in checkpoints.OWN_GRAPHS),
    ("llama", 4, "float32", "sequential"),
    ("llama", 8, "float32", "nano-batched-2"),
    ("mixtral", 8, "float16", "nano-batched-2"),
]
# In 16 bits the ranks' sums are rounded otherwise than those of one: log-probabilities so near may change places.
# Random weights have many such places in bfloat16, where another expert may be chosen, too; the demo model few.
TIES = {"float32": 0.0, "float16": 0.02, "bfloat16": 0.05}
IN_PROCESS = """
import os, signal, sys, threading, time
from pathlib import Path
from support.process_tree import children
from nanoflow_backend.engine import LLM, SamplingParams
made = LLM.from_pretrained(sys.argv[1], device="cuda", dense_batch_tokens=32, kv_cache_tokens=4096, tensor_parallel=2)
(rank,) = children(os.getpid())
killed = []
def kill():
    os.kill(rank, signal.SIGKILL)
    killed.append(time.monotonic())
threading.Timer(1.0, kill).start()
try:
    made.generate([[1, 2, 3]] * 8, SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True))
except RuntimeError as error:
    print(f"{time.monotonic() - killed[0]:.3f} {error}", flush=True)
os._exit(0)
"""


@pytest.fixture(autouse=True)
def one_gpu_for_all_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of one test at a time, whichever process runs it: kernels that wait take each other's time."""
    monkeypatch.setenv(SHARED, "1")
    with Path(tempfile.gettempdir(), "nanoflow_tensor_parallel.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def completions(model: Path, prompts: list[Any], **options: Any) -> list[Any]:
    made = LLM.from_pretrained(model, **OPTIONS | options)
    try:
        found = made.generate(prompts, GREEDY)
        made.engine.scheduler.check()
        return found
    finally:
        made.close()


def check(expected: list[Any], found: list[Any], tie: float) -> None:
    """The same tokens, up to where the two likeliest of one rank are a tie; and few completions have one."""
    ties = 0
    for one, several in zip(expected, found, strict=True):
        pairs = enumerate(zip(one.token_ids, several.token_ids, strict=True))
        for place in [place for place, (ours, theirs) in pairs if ours != theirs][:1]:
            sampled, *_, second = one.logprobs[place].logprobs
            assert sampled - second < tie, f"token {place}: {one.token_ids} became {several.token_ids}"
            ties += 1
    assert ties <= len(expected) // 4


@pytest.mark.parametrize(("name", "ranks", "dtype", "schedule"), CASES, ids=lambda value: str(value))
def test_greedy_tokens_are_those_of_one_rank(name: str, ranks: int, dtype: str, schedule: str, tmp_path: Path) -> None:
    folder, rng = checkpoints.save(checkpoints.make(name), tmp_path), random.Random(ranks)
    prompts = [[rng.randrange(331) for _ in range(rng.randint(1, 40))] for _ in range(8)]
    options = {"dtype": dtype, "schedule": schedule}
    expected = completions(folder, prompts, **options)
    found = completions(folder, prompts, tensor_parallel=ranks, **options)
    check(expected, found, TIES[dtype])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_demo_model_says_the_same(dtype: str) -> None:
    expected = completions(DEMO_MODEL, list(TEXTS), dtype=dtype)
    found = completions(DEMO_MODEL, list(TEXTS), dtype=dtype, tensor_parallel=2, schedule="nano-batched-2")
    check(expected, found, TIES[dtype])


@pytest.mark.parametrize("victim", [1, 3])
def test_a_killed_rank_is_named_within_two_seconds_and_leaves_nothing(victim: int, tmp_path: Path) -> None:
    """The other ranks' kernels wait for it on the device. Afterwards an engine starts as before."""
    folder = checkpoints.save(checkpoints.make("llama"), tmp_path)
    params = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
    for killed in (True, False):
        client = Client(config(folder, tensor_parallel=4, **OPTIONS))
        client.process.start()
        engine = client.process.pid
        ranks = sorted(children(engine))  # as they were started
        client.process.submit(Request(0, [1, 2, 3], params))
        client.wait_for(lambda client=client: len(client.tokens.get(0, [])) > 2)
        if killed:
            os.kill(ranks[victim - 1], signal.SIGKILL)
            killed_s = time.monotonic()
            client.wait_for(lambda client=client: client.deaths)
            assert time.monotonic() - killed_s < 2
            assert f"rank {victim}: process {ranks[victim - 1]} " in client.deaths[0]
        client.process.stop()
        until(lambda ranks=ranks, engine=engine: not any(map(alive, (engine, *ranks))))


def test_rank_0_in_a_program_of_ones_own_does_not_wait_for_ever(tmp_path: Path) -> None:
    """It has kernels that wait for the dead one, and nobody ends its process."""
    folder = checkpoints.save(checkpoints.make("llama"), tmp_path)
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", IN_PROCESS, str(folder)]
    ran = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120, check=False
    )
    assert "rank 1: process" in ran.stdout, ran.stderr[-2000:]
    assert float(ran.stdout.split()[0]) < 2
