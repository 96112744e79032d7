"""Ranks of the peer-to-peer kernels in processes of their own, which map the same shared memory.

The kernel language's interpreter runs one program at a time and keeps state in its modules, so ranks that wait for each
other cannot share a process.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable

import torch
import torch.multiprocessing
from nanoflow_kernels.collectives.peers import ALIGNMENT, PAD_BYTES, Peers, peers_at
from torch import Tensor
from triton.runtime.interpreter import interpreter_builder

REST_S = 2e-4  # of who has polled a signal: the ranks may be more than the cores


def run_peers(ranks: int, work: Callable[[Peers], None], buffer_bytes: int) -> None:
    """Call `work`, a function of a module, on each of the ranks, all at once. An error of one is raised here."""
    size = -(-buffer_bytes // ALIGNMENT) * ALIGNMENT
    memory = torch.zeros(ranks, PAD_BYTES + size, dtype=torch.uint8).share_memory_()
    multiprocessing.set_forkserver_preload(["torch", "triton"])
    torch.multiprocessing.start_processes(_rank, (memory, work), nprocs=ranks, start_method="forkserver")


def _rank(rank: int, memory: Tensor, work: Callable[[Peers], None]) -> None:
    torch.set_num_threads(1)
    rest_while_polling()
    pads = [one.data_ptr() for one in memory]
    peers = peers_at(
        [pad + PAD_BYTES for pad in pads],
        pads,
        rank=rank,
        buffer_bytes=memory.shape[1] - PAD_BYTES,
        abort=torch.zeros(1, dtype=torch.int32),
        device="cpu",
        memory=memory,
    )
    work(peers)


def rest_while_polling() -> None:
    """From now on programs of this process leave the core to others whenever they look at a signal."""
    poll = interpreter_builder.create_atomic_rmw

    def rest_and_poll(*operands: object) -> object:
        time.sleep(REST_S)
        return poll(*operands)

    interpreter_builder.create_atomic_rmw = rest_and_poll
