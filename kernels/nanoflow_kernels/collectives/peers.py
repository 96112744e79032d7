"""Peers is what the kernels of one rank know of its group: where the memory of every rank lies, and how far they are.

Each rank has a buffer, which holds what it sends and what it is sent, and a pad of signals, through which it is told
that something has come. All ranks reach all of them by address, over NVLink between GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

MAX_RANKS = 8
MAX_PROGRAMS = 640  # of a launch; each has signals of its own
PHASES = 2  # barriers of a call, at most
PAD_BYTES = PHASES * MAX_PROGRAMS * MAX_RANKS * 8
ALIGNMENT = 256  # bytes


@dataclass(frozen=True, eq=False)
class Peers:
    """One rank's view of its group. `peers_at` checks what it is given; `virtual_peers` makes a group in one process.

    Calls of one `Peers` must run one after the other, in the same order on every rank, with as many programs: all on
    one stream, or ordered by events. Lanes that exchange side by side have a `Peers` each.

    buffers, pads [ranks] int64, on the device: the address of each rank's buffer and pad, as this process sees them.
    counters [2] int64, on the device, this rank's own: calls that have ended, and programs of the running one that
    have. Kernels alone write them, so that a CUDA graph that is replayed counts on.
    abort [1] int32, in pinned host memory: once it is not 0, no kernel waits any longer. What calls then return is
    undefined, and the group of no more use.
    buffer_bytes: of each buffer. memory: whatever has to live as long as the addresses.
    """

    rank: int
    buffers: Tensor
    pads: Tensor
    counters: Tensor
    abort: Tensor
    buffer_bytes: int
    memory: object = field(default=None, repr=False)

    @property
    def ranks(self) -> int:
        """Ranks of the group."""
        return len(self.buffers)

    @property
    def half_bytes(self) -> int:
        """Calls take turns with the halves of a buffer. Who starts a call knows that all ranks have ended the one
        before the last, so nobody reads any more what it overwrites."""
        return self.buffer_bytes // 2 // ALIGNMENT * ALIGNMENT


def peers_at(
    buffers: Sequence[int],
    pads: Sequence[int],
    *,
    rank: int,
    buffer_bytes: int,
    abort: Tensor,
    device: torch.device | str,
    memory: object = None,
) -> Peers:
    """The view of one rank, from the addresses of all ranks' buffers and pads in this process.

    Pads have PAD_BYTES, which are zeros before any rank makes its first call.

    Raises:
        ValueError: names the argument that is not as Peers says.
    """
    ranks = len(buffers)
    if not 1 <= ranks <= MAX_RANKS:
        raise ValueError(f"peers: buffers: expected those of 1 to {MAX_RANKS} ranks, got {ranks}")
    if len(pads) != ranks:
        raise ValueError(f"peers: pads: expected those of {ranks} ranks, as of buffers, got {len(pads)}")
    if not 0 <= rank < ranks:
        raise ValueError(f"peers: rank: expected one of {ranks}, got {rank}")
    for name, addresses in (("buffers", buffers), ("pads", pads)):
        for other, address in enumerate(addresses):
            if address <= 0 or address % ALIGNMENT:
                raise ValueError(
                    f"peers: {name}: rank {other}: expected an address at a multiple of {ALIGNMENT}, got {address:#x}"
                )
    device = torch.device(device)
    if abort.dtype != torch.int32 or abort.shape != (1,) or abort.device.type != "cpu":
        raise ValueError(f"peers: abort: expected [1] int32 on the host, got {tuple(abort.shape)} {abort.dtype}")
    if device.type == "cuda" and not abort.is_pinned():
        raise ValueError("peers: abort: expected pinned memory, which kernels can read")
    buffer_table, pad_table = (torch.tensor(a, dtype=torch.int64, device=device) for a in (buffers, pads))
    counters = torch.zeros(2, dtype=torch.int64, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # once: any stream may use them
    return Peers(rank, buffer_table, pad_table, counters, abort, buffer_bytes, memory)


def virtual_peers(ranks: int, buffer_bytes: int, device: torch.device | str) -> list[Peers]:
    """The views of ranks that share one process and one device; on a GPU, each needs a stream of its own.

    Their launches must fit on the device together, for a program of one rank waits for those of all.
    """
    device = torch.device(device)
    size = -(-buffer_bytes // ALIGNMENT) * ALIGNMENT
    memory = torch.zeros(ranks * (size + PAD_BYTES) + ALIGNMENT, dtype=torch.uint8, device=device)
    begin = -(-memory.data_ptr() // ALIGNMENT) * ALIGNMENT
    buffers = [begin + rank * size for rank in range(ranks)]
    pads = [begin + ranks * size + rank * PAD_BYTES for rank in range(ranks)]
    abort = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
    return [
        peers_at(buffers, pads, rank=rank, buffer_bytes=size, abort=abort, device=device, memory=memory)
        for rank in range(ranks)
    ]
