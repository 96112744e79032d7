"""open_peers maps the memory of the ranks of a host into each other, for our own kernels to exchange rows through."""

from __future__ import annotations

import torch
import torch.distributed as dist
from nanoflow_kernels.collectives.peers import ALIGNMENT, PAD_BYTES, peers_at
from nanoflow_kernels.collectives.tiles import room

from nanoflow_backend.config.precision import Precision
from nanoflow_backend.config.settled import Settled
from nanoflow_backend.graph.operation import Graph, Kind, Resource
from nanoflow_backend.models.model import build
from nanoflow_backend.runtime.collectives.group import gather_bytes
from nanoflow_backend.runtime.collectives.peer import PeerToPeer, buffer_bytes
from nanoflow_backend.runtime.peer_memory import PeerMemory


def open_peers(settled: Settled) -> PeerToPeer:
    """Of a rank that has met the others, and whose GPU is the current one; every rank must call it.

    Raises: RuntimeError, see PeerMemory.
    """
    torch.zeros(1, device="cuda")  # makes this thread's context, which the driver's calls want
    rank, num_bytes = dist.get_rank(), _aligned(step_bytes(settled))
    memory = PeerMemory(rank, num_bytes + PAD_BYTES, gather_bytes)
    buffers = memory.addresses
    pads = [address + num_bytes for address in buffers]
    peers = peers_at(buffers, pads, rank=rank, buffer_bytes=num_bytes, abort=memory.abort, device="cuda")
    return PeerToPeer(peers, close=memory.close)


def step_bytes(settled: Settled) -> int:
    """What any exchange of a step takes of each rank's buffer, whatever forms a schedule gives to all-reduces."""
    config, ranks = settled.config, settled.config.tensor_parallel
    model, precision = build(settled.model_config, ranks), config.precision
    of_tokens = [_bytes(graph, config.dense_batch_tokens, precision, ranks) for graph in (model.embed, *model.layers)]
    return max(*of_tokens, _bytes(model.head, config.max_running, precision, ranks))


def _bytes(graph: Graph, tokens: int, precision: Precision, ranks: int) -> int:
    """Of a graph's exchanges: sums of ranks; and gathers of what a rank has, which take one part alone."""
    exchanges = [operation for operation in graph.operations if operation.resource is Resource.NETWORK]
    gathered = {name for operation in exchanges for name in operation.outputs}
    most = buffer_bytes(ranks, 0, 0, 1)
    for operation in exchanges:
        value = graph.values[operation.inputs[0]]
        if not operation.kernel.startswith("all_gather"):
            most = max(most, buffer_bytes(ranks, tokens, value.width, precision.element_bytes(value.dtype)))
    for name, value in graph.values.items():
        if exchanges and value.kind is Kind.TOKENS and name not in gathered:
            most = max(most, 2 * room(1, tokens, value.width, precision.element_bytes(value.dtype)))
    return most


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
