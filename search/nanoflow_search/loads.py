"""loads_of: what to measure of a model on a machine: few points, between which times are nearly straight lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from nanoflow_backend.graph.operation import Graph, Operation, Resource
from nanoflow_search.profile import Load
from nanoflow_search.profiler import Anchor
from nanoflow_search.work import Mix

TILE_ROWS, TILE_COLUMNS = 128, 256  # of a dense product, that one SM works on at a time
STEPS = (128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)  # tokens
FEW_WAVES = 4  # of tiles: from there on a last one that is not full makes little of the time
CAPS = (0.125, 0.25, 0.375, 0.5, 1.0)  # shares of the SMs that attention is launched on beside products
PAIR_CAP = 0.25  # that stands for all where a launch is short
PAIR_TOKENS = 1024  # of the products in pairs: about a nano-batch
ATTENTION_SMS = (24, 32, 40, 48)  # that a partition may give to attention
PARTITION_TOKENS = (512, 768, 1024, 1536)  # of products in a partition: nano-batches


class Loads(NamedTuple):
    alone: tuple[Anchor, ...]
    together: tuple[tuple[Load, Load], ...]


def loads_of(graph: Graph, device_sms: int, mix: Mix, largest_tokens: int = 4096) -> Loads:
    """For batches of up to `largest_tokens`; decodes read as many keys as a batch of `mix` does, prompts likewise."""
    alone: list[Anchor] = []
    together: list[tuple[Load, Load]] = []
    attention = next(op for op in graph.operations if op.kernel == "attention")
    keys = mix.decode_tokens * mix.decode_context
    seen = mix.prefill_tokens * mix.prefill_context
    caps, few = [_cap(device_sms, share) for share in CAPS], _cap(device_sms, PAIR_CAP)
    decode, prefill = (f"{attention.name}/{phase}" for phase in ("decode", "prefill"))
    for op in graph.operations:
        product = Load(op.name, PAIR_TOKENS)
        if op.kernel == "attention":
            for curve, most in ((decode, keys), (prefill, seen)):
                if not most:
                    continue
                alone += [Anchor(Load(curve, share * most), share == 1) for share in (0.125, 0.25, 0.5, 1)]
                alone += [Anchor(Load(curve, 0.5 * most, cap), True) for cap in caps if cap]
                alone += [Anchor(Load(curve, most, cap)) for cap in caps if cap]
        elif op.resource is Resource.COMPUTE:
            amounts = _amounts(graph, op, device_sms, largest_tokens)
            twice = {amounts[0], min(512, largest_tokens), amounts[-1]}
            alone += [Anchor(Load(op.name, tokens), tokens in twice) for tokens in amounts]
            together += [(product, Load(decode, keys, cap)) for cap in caps if keys]
            together += [(product, Load(prefill, seen, cap)) for cap in (few, None) if seen]
        elif op.resource is Resource.MEMORY:
            alone += [Anchor(Load(op.name, tokens)) for tokens in (128, 1024, largest_tokens)]
            together += [(product, Load(decode, keys, few))] if keys else []
        else:
            alone.append(Anchor(Load(op.name, largest_tokens)))
    return Loads(tuple(alone), tuple(together))


def partition_loads_of(
    graph: Graph, device_sms: int, mix: Mix, largest_tokens: int = 2048, sizes: Sequence[int] = ATTENTION_SMS
) -> Loads:
    """For plans whose attention has SMs of its own, one of `sizes`, and all else the rest; and for sequential.

    What has SMs of its own is slowed down by the memory and the power that it shares, which two sizes show.
    """
    alone: list[Anchor] = []
    together: list[tuple[Load, Load]] = []
    attention = next(op for op in graph.operations if op.kernel == "attention")
    middle = sorted(sizes)[len(sizes) // 2 - 1 :][:2]  # to pair
    most = {
        f"{attention.name}/decode": mix.decode_tokens * mix.decode_context,
        f"{attention.name}/prefill": mix.prefill_tokens * mix.prefill_context,
    }
    beside = [(curve, keys) for curve, keys in most.items() if keys]
    for op in graph.operations:
        if op is attention:
            for curve, keys in beside:
                alone += [Anchor(Load(curve, share * keys), share == 1) for share in (0.5, 1)]
                for sms in sizes:
                    alone += [Anchor(Load(curve, 0.5 * keys, sms), True), Anchor(Load(curve, keys, sms))]
        elif op.resource is Resource.COMPUTE:
            amounts = [tokens for tokens in STEPS if 512 <= tokens < largest_tokens] + [largest_tokens]
            alone += [Anchor(Load(op.name, n), n in (amounts[0], amounts[-1])) for n in (128, 256, *amounts)]
            for sms in sizes:
                halves = [Load(op.name, n, device_sms - sms) for n in PARTITION_TOKENS if n < largest_tokens]
                alone += [Anchor(load, load.amount == PAIR_TOKENS and sms in middle) for load in halves]
            for curve, keys in beside:
                for sms in middle if curve == beside[0][0] else middle[:1]:
                    together.append((Load(op.name, PAIR_TOKENS, device_sms - sms), Load(curve, 0.5 * keys, sms)))
        elif op.resource is Resource.MEMORY:
            shares = (None, device_sms - max(sizes), device_sms - min(middle))
            alone += [Anchor(Load(op.name, n, sms)) for sms in shares for n in (PAIR_TOKENS, largest_tokens)]
            for curve, keys in beside:
                together.append((Load(op.name, PAIR_TOKENS, shares[-1]), Load(curve, 0.5 * keys, min(middle))))
        else:
            alone += [Anchor(Load(op.name, largest_tokens, sms)) for sms in (None, device_sms - max(sizes))]
    return Loads(tuple(alone), tuple(together))


def _cap(device_sms: int, share: float) -> int | None:
    return None if share == 1 else max(4, round(device_sms * share / 4) * 4)


def _amounts(graph: Graph, op: Operation, device_sms: int, largest: int) -> list[int]:
    """Where time bends: tokens that fill a wave of tiles, and the next tile of rows; and STEPS."""
    columns = next(p.shape[-2] for p in graph.parameters if p.name == op.parameters[0])
    across = -(-columns // TILE_COLUMNS)
    found = {tokens for tokens in STEPS if tokens < largest} | {largest}
    for wave in range(1, FEW_WAVES + 1):
        rows = wave * device_sms // across
        found |= {TILE_ROWS * r for r in (rows, rows + 1) if 0 < TILE_ROWS * r <= largest}
    return sorted(found)
