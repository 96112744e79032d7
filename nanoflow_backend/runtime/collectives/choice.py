"""open_collectives makes what a rank exchanges rows with, as its configuration says."""

from __future__ import annotations

from importlib import import_module

import torch
import torch.distributed as dist

from nanoflow_backend.config.precision import Precision
from nanoflow_backend.config.settled import Settled
from nanoflow_backend.graph.operation import Graph, Resource
from nanoflow_backend.models.model import build
from nanoflow_backend.runtime.collectives.gloo import Gloo
from nanoflow_backend.runtime.collectives.group import gather_bytes, talking_over
from nanoflow_backend.runtime.collectives.nccl import Nccl
from nanoflow_backend.runtime.collectives.protocol import Collectives
from nanoflow_backend.runtime.peer_memory import PeerMemory

LEAST_BYTES = 2**23  # of a buffer: small messages take as much of it for each rank as they are long
GRAIN_BYTES = 2**12  # what lies behind a buffer begins at a multiple


def open_collectives(settled: Settled, interface: str) -> Collectives:
    """Of a rank that has met the others; every rank must call it.

    Args:
        interface: of the network, over which NCCL's ranks find each other.

    Raises:
        RuntimeError: the ranks cannot reach each other as `collectives` says, or one has ended.
    """
    match settled.config.collectives:
        case "gloo":
            return Gloo()
        case "nccl":
            with talking_over(interface):
                return Nccl()
        case "peer":
            return open_peers(buffer_bytes(settled))
        case other:
            raise ValueError(f"collectives: expected what a device has, got {other}")


def open_peers(num_bytes: int) -> Collectives:
    """Our own kernels, on a buffer of so many bytes of each rank. Raises: RuntimeError, see PeerMemory."""
    peers, peer = (import_module(name) for name in ("nanoflow_kernels.collectives.peers", f"{__package__}.peer"))
    torch.cuda.current_stream()  # a context for the driver's calls
    rank, num_bytes = dist.get_rank(), -(-num_bytes // GRAIN_BYTES) * GRAIN_BYTES
    memory = PeerMemory(rank, num_bytes + peers.PAD_BYTES, gather_bytes)
    pads = [address + num_bytes for address in memory.addresses]
    made = peers.peers_at(
        memory.addresses, pads, rank=rank, buffer_bytes=num_bytes, abort=memory.abort, device="cuda", memory=memory
    )
    collectives: Collectives = peer.PeerToPeer(made)
    return collectives


def buffer_bytes(settled: Settled) -> int:
    """What any exchange of a step takes of each rank's buffer."""
    config, ranks = settled.config, settled.config.tensor_parallel
    model, precision = build(settled.model_config, ranks), config.precision
    of_tokens = [
        _most_bytes(graph, precision, ranks, config.dense_batch_tokens) for graph in (model.embed, *model.layers)
    ]
    return max(LEAST_BYTES, *of_tokens, _most_bytes(model.head, precision, ranks, config.max_running))


def _most_bytes(graph: Graph, precision: Precision, ranks: int, tokens: int) -> int:
    """Of a graph's exchanges. A buffer has two halves; in one there is place for what every rank sends of a part of
    the matrix, rows or columns, and for the part that is gathered; where nothing is summed, for this one alone."""
    most = 0
    for operation in graph.operations:
        if operation.resource is Resource.NETWORK:
            values = [graph.values[name] for name in (*operation.inputs, *operation.outputs)]
            width, element_bytes = max(v.width for v in values), max(precision.element_bytes(v.dtype) for v in values)
            parts = 1 if operation.kernel.startswith("all_gather") else ranks + 1
            part = max(-(-tokens // ranks) * _aligned(width), tokens * _aligned(-(-width // ranks)))
            most = max(most, 2 * parts * part * element_bytes + GRAIN_BYTES)
    return most


def _aligned(columns: int) -> int:
    """Elements of a row in a buffer."""
    return -(-columns // 16) * 16
