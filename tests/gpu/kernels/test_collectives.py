"""The peer-to-peer kernels on a device: ranks are streams of one process, whose launches fit on the device together.

They say nothing of the order in which NVLink carries writes and signals: that takes several GPUs.
"""

from __future__ import annotations

import time
from random import Random

import pytest
import torch
from nanoflow_kernels.collectives.copy_engine import CopyEngine
from nanoflow_kernels.collectives.peers import Peers, virtual_peers
from nanoflow_kernels.grid import device_sms
from support.collectives.exchanges import KERNELS, Exchange
from support.collectives.virtual_ranks import VirtualRanks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
RANKS = [2, 4, 8]
SHAPES = [(1, 4096), (3, 1031), (7, 8192), (257, 5120), (1031, 512), (521, 97), (2053, 4096)]  # T and D
FEW = [(7, 8192), (257, 1031)]
SECONDS = 60.0  # of which few are needed, unless other processes share the device


def width_for(kernel: str, ranks: int, width: int) -> int:
    """Columns are shared out evenly: of odd ones, each rank has as many."""
    return width * ranks if "columns" in kernel and width % ranks else width


def fitting_sms(ranks: int) -> list[int]:
    """SMs of one rank: one, a few, and as many as all ranks have together on the device."""
    return [1, 5, device_sms(torch.device("cuda", 0)) // ranks]


@pytest.mark.parametrize(
    ("ranks", "dtype", "shapes"),
    [(ranks, torch.bfloat16, SHAPES) for ranks in RANKS]
    + [(ranks, torch.bfloat16, FEW) for ranks in (1, 3, 5)]
    + [(ranks, dtype, FEW) for ranks in (2, 8) for dtype in (torch.float16, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_sums_are_those_of_float64_and_the_same_bits_on_any_number_of_sms(
    kernel: str, ranks: int, dtype: torch.dtype, shapes: list[tuple[int, int]]
) -> None:
    widest = max(tokens * (width_for(kernel, ranks, width) + 16 * ranks) for tokens, width in shapes)
    group = VirtualRanks(ranks, 2 * (ranks + 1) * widest * dtype.itemsize)
    for tokens, columns in shapes:
        case = Exchange(kernel, ranks, tokens, width_for(kernel, ranks, columns), dtype, "cuda")
        first: list[torch.Tensor] = []
        for num_sms in fitting_sms(ranks):
            case.poison()
            group.poison()
            with group.ended_within(SECONDS):
                group.launch(lambda peers, case=case, sms=num_sms: case.call(peers, sms))
            for rank in range(ranks):
                case.check(rank)
            outs = [out.clone() for outs in case.outs for out in outs]
            first = first or outs
            assert all(torch.equal(one, other) for one, other in zip(outs, first, strict=True))
            normed = [outs[1] for outs in case.outs if len(outs) > 1]
            assert all(torch.equal(one, normed[0]) for one in normed)


@pytest.mark.parametrize("ranks", RANKS)
def test_ten_thousand_calls_of_all_kinds_with_delays_and_poison(ranks: int) -> None:
    """Sizes, kinds and SMs change from call to call, ranks are late at random, and no host waits between calls."""
    group, random = VirtualRanks(ranks, 8 << 20), Random(ranks)
    sizes = [(1, 512), (13, 1031), (67, 1024), (131, 2048)]
    cases = [
        Exchange(kernel, ranks, tokens, width_for(kernel, ranks, width), dtype, "cuda", seed)
        for seed, (kernel, (tokens, width), dtype) in enumerate(
            (kernel, size, dtype) for kernel in KERNELS for size in sizes for dtype in (torch.bfloat16, torch.float32)
        )
    ]
    sms = fitting_sms(ranks)[:2]
    for case in cases:  # compiles
        for num_sms in sms:
            with group.ended_within(SECONDS):
                group.launch(lambda peers, case=case, num_sms=num_sms: case.call(peers, num_sms))
        for rank in range(ranks):
            case.check(rank)
    wrong = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in range(ranks)]
    for _ in range(100):
        group.poison()
        with group.ended_within(SECONDS):
            for _ in range(100):
                case, num_sms = random.choice(cases), random.choice(sms)
                delays = [random.choice([0, 0, 0, 1000, 100_000]) for _ in range(ranks)]

                def once(peers: Peers, case: Exchange = case, num_sms: int = num_sms) -> None:
                    for out in case.outs[peers.rank]:
                        out.fill_(torch.nan)
                    case.call(peers, num_sms)
                    wrong[peers.rank] += case.mismatches(peers.rank)

                group.launch(once, delays)
        assert [int(count) for count in wrong] == [0] * ranks


@pytest.mark.parametrize("ranks", RANKS)
def test_captured_calls_are_replayed(ranks: int) -> None:
    group, random = VirtualRanks(ranks, 8 << 20), Random(ranks)
    cases = [Exchange(kernel, ranks, 67, 1024, torch.bfloat16, "cuda", seed) for seed, kernel in enumerate(KERNELS)]
    for case in cases:  # compiles
        with group.ended_within(SECONDS):
            group.launch(lambda peers, case=case: case.call(peers, 3))
    wrong = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in range(ranks)]
    graphs = []
    for peers, stream in zip(group.peers, group.streams, strict=True):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for case in cases:
                for out in case.outs[peers.rank]:
                    out.fill_(torch.nan)
                case.call(peers, 3)
                wrong[peers.rank] += case.mismatches(peers.rank)
        graphs.append(graph)
    torch.cuda.synchronize()
    for _ in range(10):
        group.poison()
        with group.ended_within(SECONDS):
            for _ in range(100):
                delays = [random.choice([0, 0, 1000, 100_000]) for _ in range(ranks)]
                group.launch(lambda peers: graphs[peers.rank].replay(), delays)
        assert [int(count) for count in wrong] == [0] * ranks
    assert [int(peers.counters[0]) for peers in group.peers] == [1001 * len(cases)] * ranks


@pytest.mark.parametrize("kernel", ["all_gather_rows", "all_gather_columns"])
@pytest.mark.parametrize("ranks", RANKS)
def test_copy_engines_gather_what_kernels_would_also_captured(ranks: int, kernel: str) -> None:
    group, random = VirtualRanks(ranks, 16 << 20), Random(ranks)
    engines = [CopyEngine(peers) for peers in group.peers]
    sizes = [(1, 512), (13, 1031), (67, 1024), (1031, 2048)]
    cases = [
        Exchange(kernel, ranks, tokens, width_for(kernel, ranks, width), torch.bfloat16, "cuda", seed)
        for seed, (tokens, width) in enumerate(sizes)
    ]
    wrong = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in range(ranks)]

    def all_cases(peers: Peers) -> None:
        for case in cases:
            (x,), (out,) = case.inputs[peers.rank], case.outs[peers.rank]
            out.fill_(torch.nan)
            getattr(engines[peers.rank], kernel)(x, out=out)
            wrong[peers.rank] += case.mismatches(peers.rank)

    alone = virtual_peers(1, 16 << 20, "cuda")[0]
    for case in cases:  # the driver loads what it needs, while nobody waits
        whole = case.expected[0][0]
        assert whole is not None
        CopyEngine(alone).all_gather_rows(whole, out=torch.empty_like(whole))
    group.poison()
    with group.ended_within(SECONDS):
        group.launch(all_cases)
    for case in cases:
        for rank in range(ranks):
            case.check(rank)
    graphs = []
    for peers, stream in zip(group.peers, group.streams, strict=True):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            all_cases(peers)
        graphs.append(graph)
    group.poison()
    with group.ended_within(SECONDS):
        for _ in range(200):
            delays = [random.choice([0, 0, 1000, 100_000]) for _ in range(ranks)]
            group.launch(lambda peers: graphs[peers.rank].replay(), delays)
    assert [int(count) for count in wrong] == [0] * ranks


@pytest.mark.parametrize("kernel", KERNELS)
def test_who_waits_for_a_lost_rank_is_ended_by_the_abort_word(kernel: str) -> None:
    group = VirtualRanks(2, 8 << 20)
    case = Exchange(kernel, 2, 67, 1024, torch.bfloat16, "cuda")
    with group.ended_within(SECONDS):
        group.launch(lambda peers: case.call(peers, 3))  # compiles
    with torch.cuda.stream(group.streams[0]):
        case.call(group.peers[0], 3)
        ended = torch.cuda.Event()
        ended.record()
    time.sleep(0.3)
    assert not ended.query()
    group.abort.fill_(1)
    begun_s = time.monotonic()
    while not ended.query():
        assert time.monotonic() < begun_s + 5
    torch.cuda.synchronize()
