"""The peer-to-peer kernels in the kernel language's interpreter: ranks are processes over shared memory."""

from __future__ import annotations

import ctypes
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from nanoflow_kernels.collectives import all_gather, reduce_scatter
from nanoflow_kernels.collectives.copy_engine import CopyEngine
from nanoflow_kernels.collectives.one_shot import all_reduce_one_shot
from nanoflow_kernels.collectives.peers import PAD_BYTES, Peers, peers_at, virtual_peers
from nanoflow_kernels.collectives.two_shot import all_reduce_two_shot
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


def copy_rows(to: int, to_stride: int, source: int, source_stride: int, row_bytes: int, rows: int) -> None:
    for row in range(rows):
        ctypes.memmove(to + row * to_stride, source + row * source_stride, row_bytes)


def gather_by_copies(peers: Peers) -> None:
    """Twice each, with other values: a rank that is early must not change what others still copy."""
    warnings.simplefilter("ignore", DeprecationWarning)
    engine = CopyEngine(peers, copy_rows)
    for seed, (kernel, tokens) in enumerate(product(("all_gather_rows", "all_gather_columns"), (0, 1, 7, 13))):
        case = Exchange(kernel, peers.ranks, tokens, 5 * peers.ranks, torch.float16, "cpu", seed)
        (x,), (out,) = case.inputs[peers.rank], case.outs[peers.rank]
        if peers.rank == 0:
            time.sleep(0.02 * (seed % 3))
        getattr(engine, kernel)(x, out=out)
        case.check(peers.rank)
    assert peers.counters.tolist() == [12, 0]


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
        (2, [(0, 4, FP32, None), (1, 5, torch.bfloat16, 1), (67, 31, FP32, None)]),
        (4, [(13, 7, torch.float16, None)]),
    ],
)
def test_every_rank_gets_the_sums_of_float64(ranks: int, cases: list[Any]) -> None:
    run_peers(ranks, partial(calls_in_turns, cases=cases), BUFFER_BYTES)


def test_copies_gather_what_kernels_would() -> None:
    run_peers(3, gather_by_copies, 13 * 5 * 2)


def test_a_rank_that_nobody_meets_is_let_go_by_the_abort_word() -> None:
    run_peers(2, wait_for_nobody, BUFFER_BYTES)


ONE = virtual_peers(2, 4096, "cpu")[1]
GIVEN = {"rank": 1, "buffer_bytes": 64, "abort": torch.zeros(1, dtype=torch.int32), "device": "cpu"}


@pytest.mark.parametrize(
    ("buffers", "pads", "change", "message"),
    [
        ([], [], {}, "buffers: expected those of 1 to 8 ranks, got 0"),
        ([256] * 9, [256] * 9, {}, "buffers: expected those of 1 to 8 ranks, got 9"),
        ([256] * 2, [256], {}, "pads: expected those of 2 ranks, as of buffers, got 1"),
        ([256] * 2, [256] * 2, {"rank": 2}, "rank: expected one of 2, got 2"),
        ([256, 264], [256] * 2, {}, "buffers: rank 1: expected an address at a multiple of 256, got 0x108"),
        ([256] * 2, [0, 256], {}, "pads: rank 0: expected an address at a multiple of 256, got 0x0"),
        ([256] * 2, [256] * 2, {"abort": torch.zeros(2, dtype=torch.int32)}, r"abort: expected \[1\] int32"),
        ([256] * 2, [256] * 2, {"abort": torch.zeros(1)}, r"abort: expected \[1\] int32"),
    ],
)
def test_a_group_that_cannot_be_is_refused(
    buffers: list[int], pads: list[int], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        peers_at(buffers, pads, **(GIVEN | change))


def wide(rows: int, columns: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.zeros(rows, columns, dtype=dtype)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: all_reduce_one_shot(wide(3, 4), ONE, out=wide(3, 5)), r"all_reduce_one_shot: out: expected shape"),
        (lambda: all_reduce_two_shot(wide(3, 4), ONE, out=wide(2, 4)), r"all_reduce_two_shot: out: expected shape"),
        (lambda: all_reduce_two_shot(wide(3, 4).T, ONE, out=wide(4, 3)), "x: expected a matrix of contiguous rows"),
        (lambda: all_reduce_two_shot(wide(3, 4), ONE, out=wide(3, 4, torch.float16)), "out: expected torch.float32"),
        (lambda: all_reduce_two_shot(wide(3, 4), ONE, out=wide(3, 4), num_sms=0), "num_sms: expected a positive"),
        (lambda: reduce_scatter.reduce_scatter_rows(wide(3, 4), ONE, out=wide(2, 4)), r"out: expected shape \(1, 4\)"),
        (lambda: reduce_scatter.reduce_scatter_columns(wide(3, 5), ONE, out=wide(3, 2)), r"x: expected shape \(3, 4\)"),
        (lambda: all_gather.all_gather_rows(wide(2, 4), ONE, out=wide(3, 4)), r"x: expected shape \(1, 4\)"),
        (lambda: all_gather.all_gather_columns(wide(3, 2), ONE, out=wide(3, 5)), r"out: expected shape \(3, 4\)"),
        (lambda: CopyEngine(ONE).all_gather_rows(wide(2, 4), out=wide(3, 4)), r"x: expected shape \(1, 4\)"),
        (lambda: CopyEngine(ONE).all_gather_columns(wide(3, 2), out=wide(3, 5)), r"out: expected shape \(3, 4\)"),
        (
            lambda: CopyEngine(ONE).all_gather_columns(wide(65, 16), out=wide(65, 32)),
            "expected buffers of 4160 bytes or more, got 4096",
        ),
        (lambda: all_reduce_one_shot(wide(65, 16), ONE, out=wide(65, 16)), "expected buffers of 16896 bytes or more"),
    ],
)
def test_wrong_operands_are_named_before_anything_waits(call: Callable[[], None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
    assert ONE.counters.tolist() == [0, 0]


def test_virtual_ranks_have_memory_of_their_own() -> None:
    peers = virtual_peers(3, 1000, "cpu")
    assert [one.rank for one in peers] == [0, 1, 2]
    begins = sorted([*peers[0].buffers.tolist(), *peers[0].pads.tolist()])
    assert all(stop - start >= 1024 for start, stop in pairwise(begins))
    assert begins[-1] + PAD_BYTES <= peers[0].memory.data_ptr() + len(peers[0].memory)
    assert all(torch.equal(one.buffers, peers[0].buffers) and one.abort is peers[0].abort for one in peers)
    assert len({one.counters.data_ptr() for one in peers}) == 3
