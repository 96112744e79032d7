"""The peer-to-peer kernels in the kernel language's interpreter: ranks are processes over shared memory."""

from __future__ import annotations

import threading
import time
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from nanoflow_kernels.collectives.peers import Peers
from support.collectives.exchanges import KERNELS, Exchange
from support.collectives.peer_ranks import run_peers

if torch.cuda.is_available():
    pytest.skip("the kernels are compiled here: see tests/gpu", allow_module_level=True)

BUFFER_BYTES = 1 << 16
FP32 = torch.float32


def calls_in_turns(peers: Peers, cases: list[tuple[int, int, torch.dtype, int | None]]) -> None:
    """Each kernel on each case, one after the other on the same buffers, which end up full of earlier calls' rows."""
    warnings.simplefilter("ignore", DeprecationWarning)  # the interpreter's own
    calls = 0
    for tokens, width, dtype, num_sms in cases:
        for kernel in KERNELS:
            columns = width * peers.ranks if "columns" in kernel else width
            case = Exchange(kernel, peers.ranks, tokens, columns, dtype, "cpu", seed=calls)
            case.call(peers, num_sms)
            case.check(peers.rank)
            calls += tokens > 0
    assert peers.counters.tolist() == [calls, 0]


def wait_for_nobody(peers: Peers) -> None:
    """Rank 1 never calls; rank 0 is let go by the abort word."""
    warnings.simplefilter("ignore", DeprecationWarning)
    if peers.rank == 1:
        return
    case = Exchange("all_reduce_one_shot", 2, 3, 5, torch.float32, "cpu")
    waiting = threading.Event()
    late = threading.Timer(0.3, lambda: (waiting.set(), peers.abort.fill_(1)))
    late.start()
    begun_s = time.monotonic()
    case.call(peers)
    assert waiting.is_set(), "rank 0 did not wait for rank 1"
    assert time.monotonic() < begun_s + 10


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        (2, [(0, 4, FP32, None), (3, 5, FP32, 1), (67, 31, torch.float16, None), (1, 32, torch.bfloat16, 2)]),
        (4, [(3, 7, FP32, 1), (13, 32, torch.float16, None)]),
    ],
)
def test_every_rank_gets_the_sums_of_float64(ranks: int, cases: list[Any]) -> None:
    run_peers(ranks, partial(calls_in_turns, cases=cases), BUFFER_BYTES)


def test_a_rank_that_nobody_meets_is_let_go_by_the_abort_word() -> None:
    run_peers(2, wait_for_nobody, BUFFER_BYTES)
