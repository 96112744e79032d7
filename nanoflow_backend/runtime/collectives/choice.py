"""open_collectives makes what a rank exchanges rows with, as its configuration says."""

from __future__ import annotations

from importlib import import_module

from nanoflow_backend.config.settled import Settled
from nanoflow_backend.runtime.collectives.gloo import Gloo
from nanoflow_backend.runtime.collectives.group import talking_over
from nanoflow_backend.runtime.collectives.nccl import Nccl
from nanoflow_backend.runtime.collectives.protocol import Collectives


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
            mapped = import_module(f"{__package__}.mapped_peers")  # the kernel language is there with a GPU
            collectives: Collectives = mapped.open_peers(settled)
            return collectives
        case other:
            raise ValueError(f"collectives: expected what a device has, got {other}")
