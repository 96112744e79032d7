"""Ranks of an engine on the CPU that exchange rows by the peer-to-peer kernels, through files in the place of GPUs.

As a program this module is such a rank; the folder of the files, which must be new, is named in the environment.
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

import torch
import torch.distributed as dist
from nanoflow_kernels.collectives.peers import PAD_BYTES, peers_at
from support.collectives.peer_ranks import rest_while_polling

from nanoflow_backend.config.settled import Settled
from nanoflow_backend.engine import ranks
from nanoflow_backend.runtime.collectives.mapped_peers import step_bytes
from nanoflow_backend.runtime.collectives.peer import PeerToPeer

FOLDER = "PEERS"
PAGE_BYTES = 4096


def open_shared_files(settled: Settled, interface: str) -> PeerToPeer:
    """In the place of open_collectives: each rank's memory is a file, of zeros as it is made."""
    rest_while_polling()
    num_bytes = -(-step_bytes(settled) // PAGE_BYTES) * PAGE_BYTES
    files = [str(Path(os.environ[FOLDER]) / str(rank)) for rank in range(dist.get_world_size())]
    memory = [torch.from_file(file, shared=True, size=num_bytes + PAD_BYTES, dtype=torch.uint8) for file in files]
    dist.barrier()  # all of them are as large as that
    buffers = [one.data_ptr() for one in memory]
    pads = [address + num_bytes for address in buffers]
    abort = torch.zeros(1, dtype=torch.int32)
    peers = peers_at(
        buffers, pads, rank=dist.get_rank(), buffer_bytes=num_bytes, abort=abort, device="cpu", memory=memory
    )
    return PeerToPeer(peers)


def main() -> None:
    torch.set_num_threads(1)
    ranks.open_collectives = open_shared_files
    ranks.main()


if __name__ == "__main__":
    main()
