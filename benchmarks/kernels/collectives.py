"""The peer-to-peer collectives run beside a plain copy kernel on as many SMs: what exchanging costs over moving bytes.

Ranks are streams of one process on one GPU, each with SMs of its own (a green context). Nothing crosses a link, so
these are the rates of the kernels and not of NVLink.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import triton
import triton.language as tl
import typer
from nanoflow_kernels.collectives import all_gather, reduce_scatter
from nanoflow_kernels.collectives.one_shot import all_reduce_one_shot
from nanoflow_kernels.collectives.peers import Peers, virtual_peers
from nanoflow_kernels.collectives.tiles import room
from nanoflow_kernels.collectives.two_shot import all_reduce_two_shot
from nanoflow_kernels.grid import device_sms

from nanoflow_backend.bench import result
from nanoflow_backend.offline.output import check_output
from nanoflow_backend.runtime.collectives.protocol import rank_rows
from nanoflow_backend.runtime.device import find_device
from nanoflow_backend.runtime.green_contexts import lane_streams

WIDTH = 8192  # of a row: Llama-3-70B's
ELEMENT = torch.bfloat16
TOKENS = (8, 64, 512, 4096)  # messages of 128 KiB to 64 MiB
RANKS = (8, 4, 2)
SMS = (8, 16, 32)  # of each rank
ONE_SHOT_TOKENS = 64  # beyond them two shots are faster by far
BURST_S = 5e-3
COPY_BLOCK, COPY_WARPS, COPY_PER_SM = 8192, 8, 4
MOST_COPIED = 1 << 29  # bytes that one copy reads

NAMES = ("all_reduce_one_shot", "all_reduce_two_shot", "reduce_scatter_rows", "all_gather_rows", "fused")


@dataclass(frozen=True)
class Point:
    """One kernel on messages of so many tokens, on `sms` of each of the ranks."""

    kernel: str
    ranks: int
    sms: int
    tokens: int


@dataclass(frozen=True)
class Measured:
    """What a call takes. Rates are of bytes read and written, of all ranks together."""

    kernel: str
    ranks: int
    sms_of_a_rank: int
    message_bytes: int
    moved_bytes: int
    duration_us: float
    gb_per_s: float
    copy_gb_per_s: float
    of_copy: float


def points(most_sms: int) -> Iterator[Point]:
    """The largest messages first, which the bar is about."""
    for tokens, ranks, sms, kernel in product(reversed(TOKENS), RANKS, SMS, NAMES):
        if ranks * sms <= most_sms and (kernel != "all_reduce_one_shot" or tokens <= ONE_SHOT_TOKENS):
            yield Point(kernel, ranks, sms, tokens)


def moved_bytes(kernel: str, ranks: int, tokens: int, row_bytes: int) -> int:
    """Bytes that all ranks together read and write in one call (see nanoflow_kernels.collectives)."""
    total = 0
    for rank in range(ranks):
        mine = len(rank_rows(tokens, rank, ranks))
        others, sent = tokens - mine, mine * (ranks - 1)
        scattered = 2 * others + sent + mine  # rows of others go out; those of others come in, and one's own are read
        total += {
            "all_reduce_one_shot": 2 * tokens + 2 * (ranks - 1) * tokens + tokens,
            "all_reduce_two_shot": scattered + 2 * mine + 2 * others,
            "reduce_scatter_rows": scattered + mine,
            "all_gather_rows": 3 * mine + 2 * others,
            "fused": scattered + 4 * mine + 2 * others,
        }[kernel]
    return total * row_bytes


@triton.jit
def _copy(x_ptr, out_ptr, count, BLOCK: tl.constexpr):
    for block in range(tl.program_id(0), tl.cdiv(count, BLOCK), tl.num_programs(0)):
        element = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out_ptr + element, tl.load(x_ptr + element, mask=element < count), mask=element < count)


def streams(ranks: int, sms: int) -> list[torch.cuda.Stream]:
    """One a rank, with SMs of its own."""
    rest = device_sms(torch.device("cuda", 0)) - ranks * sms
    lanes = [(f"rank {rank}", sms) for rank in range(ranks)] + ([("rest", rest)] if rest else [])
    named = lane_streams(tuple(lanes))
    return [named[f"rank {rank}"] for rank in range(ranks)]


def timed(calls: Sequence[Callable[[], object]], on: Sequence[torch.cuda.Stream]) -> float:
    """Seconds of a call, of calls that run side by side again and again, one on each stream."""

    def burst(launches: Sequence[Callable[[], object]], count: int) -> float:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in on]
        torch.cuda.synchronize()
        for launch, stream, (begin, end) in zip(launches, on, events, strict=True):
            with torch.cuda.stream(stream):
                begin.record()
                for _ in range(count):
                    launch()
                end.record()
        torch.cuda.synchronize()
        return max(float(begin.elapsed_time(end)) for begin, end in events) / 1e3

    burst(calls, 1)  # compiles
    each_s = burst(calls, 4) / 4
    in_graph = max(1, min(64, round(1e-3 / each_s)))
    graphs = []
    for call, stream in zip(calls, on, strict=True):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(in_graph):
                call()
        graphs.append(graph)
    replays = [graph.replay for graph in graphs]
    each_s = burst(replays, 2) / 2
    count = max(2, round(BURST_S / each_s))
    return min(burst(replays, count) for _ in range(3)) / count / in_graph


@cache
def copy_bytes_per_s(sms: int, size: int) -> float:
    """Bytes that a plain copy kernel reads and writes in a second, of `size` bytes to be read, on so many SMs."""
    x = torch.zeros(size // ELEMENT.itemsize, dtype=ELEMENT, device="cuda")
    out = torch.empty_like(x)
    grid = (min(COPY_PER_SM * sms, triton.cdiv(len(x), COPY_BLOCK)),)
    (stream,) = streams(1, sms)
    return 2 * size / timed([lambda: _copy[grid](x, out, len(x), COPY_BLOCK, num_warps=COPY_WARPS)], [stream])


def rank_call(point: Point, peers: Peers) -> Callable[[], object]:
    """The call of one rank, on operands of its own."""

    def normal(rows: int) -> torch.Tensor:
        return torch.randn(rows, WIDTH, dtype=ELEMENT, device="cuda")

    sms, whole, mine = point.sms, normal(point.tokens), normal(len(rank_rows(point.tokens, peers.rank, peers.ranks)))
    out, own_out = torch.empty_like(whole), torch.empty_like(mine)
    weight = torch.ones(WIDTH, dtype=ELEMENT, device="cuda")
    return {
        "all_reduce_one_shot": lambda: all_reduce_one_shot(whole, peers, out=out, num_sms=sms),
        "all_reduce_two_shot": lambda: all_reduce_two_shot(whole, peers, out=out, num_sms=sms),
        "reduce_scatter_rows": lambda: reduce_scatter.reduce_scatter_rows(whole, peers, out=own_out, num_sms=sms),
        "all_gather_rows": lambda: all_gather.all_gather_rows(mine, peers, out=out, num_sms=sms),
        "fused": lambda: reduce_scatter.reduce_scatter_add_rms_norm_all_gather(
            mine, whole, weight, peers, eps=1e-5, out=(own_out, out), num_sms=sms
        ),
    }[point.kernel]


def measure(point: Point, group: Sequence[Peers]) -> Measured:
    """Time one point, and the copy of as many bytes beside it."""
    on = streams(point.ranks, point.sms)
    call_s = timed([rank_call(point, peers) for peers in group], on)
    row_bytes = WIDTH * ELEMENT.itemsize
    moved = moved_bytes(point.kernel, point.ranks, point.tokens, row_bytes)
    copied = copy_bytes_per_s(point.ranks * point.sms, min(moved // 2, MOST_COPIED))
    return Measured(
        point.kernel,
        point.ranks,
        point.sms,
        point.tokens * row_bytes,
        moved,
        round(call_s * 1e6, 2),
        round(moved / call_s / 1e9, 1),
        round(copied / 1e9, 1),
        round(moved / call_s / copied, 3),
    )


def group_of(ranks: int) -> list[Peers]:
    """Ranks whose buffers hold the largest message in two shots, and in one the largest that is sent so."""
    element = ELEMENT.itemsize
    two_shots = room(ranks + 1, -(-max(TOKENS) // ranks), WIDTH, element)
    return virtual_peers(ranks, 2 * max(two_shots, room(ranks, ONE_SHOT_TOKENS, WIDTH, element)), "cuda")


def main(
    output: Annotated[Path, typer.Option(help="Where the JSON result goes.")],
    limit_s: Annotated[float, typer.Option(help="Nothing begins after so long; the result lists it.")] = 110,
) -> None:
    """GB/s of each peer-to-peer kernel beside a plain copy's, by ranks, SMs and bytes, on one GPU."""
    begun_s = time.monotonic()
    check_output(output)
    torch.manual_seed(0)
    device = find_device("cuda")
    groups = {ranks: group_of(ranks) for ranks in RANKS}
    measured, left_out = [], []
    for point in points(device_sms(torch.device("cuda", 0))):
        if time.monotonic() > begun_s + limit_s:
            left_out.append(asdict(point))
            continue
        measured.append(asdict(measure(point, groups[point.ranks])))
        print(" ".join(f"{key}={value}" for key, value in measured[-1].items()), flush=True)
    result.write({"device": device.name, "results": measured, "left_out": left_out}, output)
