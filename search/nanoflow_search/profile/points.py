"""loads_of: what to measure of a model on a machine: few points, between which times are nearly straight lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from nanoflow_backend.graph.operation import Graph, Operation, Resource
from nanoflow_search.cost.work import Mix, operation_work
from nanoflow_search.profile.data import Load
from nanoflow_search.profile.measure import Anchor

TILE_ROWS, TILE_COLUMNS = 128, 256  # of a dense product, that one SM works on at a time
STEPS = (128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)  # tokens
FEW_WAVES = 4  # of tiles: from there on a last one that is not full makes little of the time
CAPS = (0.125, 0.25, 0.375, 0.5, 1.0)  # shares of the SMs that attention is launched on beside products
PAIR_CAP = 0.25  # that stands for all where a launch is short
PAIR_TOKENS = 1024  # of the products in pairs: about a nano-batch
SHARES = 4  # of the SMs that a partition may give to attention, for one mix
MOST_SHARES = 5  # for all that a profile is taken for: each is some 35 points
SHARE_GRAIN = 4  # SMs by which the shares that are tried differ
# Of an SM, while attention reads a byte on another: 56 side by side (partition_placement_h200.json, 32 of 132 SMs), and
# a quarter more, since attention's lane waits for products in every layer.
FLOP_PER_BYTE = 70.0
ENOUGH = 1 / 3  # of the SMs: 40 of 132 read 0.93 of what all do (kernels_decode_partition_h200.json)
PARTITION_TOKENS = (512, 640, 768, 896, 1024, 1152, 1280, 1536)  # nano-batches: their time goes in steps of tiles


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
    graph: Graph, device_sms: int, mix: Mix, largest_tokens: int = 2048, sizes: Sequence[int] = ()
) -> Loads:
    """For plans whose attention has SMs of its own, one of `sizes`, and all else the rest; and for sequential.

    What has SMs of its own is slowed down by the memory that it shares: the two sizes in the middle show by how much.
    """
    sizes = sizes or attention_sms(graph, device_sms, mix)
    alone: list[Anchor] = []
    together: list[tuple[Load, Load]] = []
    attention = next(op for op in graph.operations if op.kernel == "attention")
    decode, prefill = (f"{attention.name}/{phase}" for phase in ("decode", "prefill"))
    most = {
        decode: mix.decode_tokens * mix.decode_context,
        prefill: mix.prefill_tokens * mix.prefill_context,
    }
    middle = (len(sizes) - 1) // 2
    likely = sorted(sizes)[middle : middle + 2]
    half = min(PAIR_TOKENS, largest_tokens)

    def up_to(*tokens: int) -> list[int]:
        return sorted({min(n, largest_tokens) for n in tokens})

    for op in graph.operations:
        if op is attention:
            for curve, amount in most.items():
                parts = (0.5, 1) if curve == decode else (0.5,)
                alone += [Anchor(Load(curve, share * amount), share == 1) for share in (0.5, 1) if amount]
                alone += [
                    Anchor(Load(curve, share * amount, sms), share == 0.5 and (curve == decode or sms == likely[0]))
                    for sms in sizes
                    for share in parts
                    if amount
                ]
        elif op.resource is Resource.COMPUTE:
            amounts = up_to(256, 512, half, largest_tokens)
            alone += [Anchor(Load(op.name, n), n in (amounts[0], amounts[-1])) for n in amounts]
            for sms in sizes:
                amounts = up_to(*PARTITION_TOKENS)
                alone += [Anchor(Load(op.name, n, device_sms - sms), n == half and sms in likely) for n in amounts]
            for sms, curve in [*((sms, decode) for sms in likely), (likely[0], prefill)]:
                if most[curve]:
                    beside = Load(curve, 0.5 * most[curve], sms)
                    together.append((Load(op.name, half, device_sms - sms), beside))
        elif op.resource is Resource.MEMORY:
            shares = (None, device_sms - max(sizes))
            alone += [Anchor(Load(op.name, n, sms)) for sms in shares for n in up_to(512, largest_tokens)]
            if most[decode]:
                beside = Load(decode, 0.5 * most[decode], likely[0])
                together.append((Load(op.name, half, device_sms - likely[0]), beside))
        else:
            alone += [Anchor(Load(op.name, largest_tokens, sms)) for sms in (None, device_sms - max(sizes))]
    return Loads(tuple(alone), tuple(together))


def attention_sms(graph: Graph, device_sms: int, mix: Mix) -> tuple[int, ...]:
    """Sizes of attention's share around that in which its reading lasts as long as the products on the other SMs, up to
    what fills the memory's bandwidth."""
    reading = FLOP_PER_BYTE * sum(
        operation_work(graph, op, mix).memory_bytes for op in graph.operations if op.kernel == "attention"
    )
    products = sum(operation_work(graph, op, mix).flop for op in graph.operations if op.resource is Resource.COMPUTE)
    balanced = device_sms * reading / (reading + products)
    first = min(round(balanced / SHARE_GRAIN - (SHARES - 1) / 2), int(ENOUGH * device_sms / SHARE_GRAIN) - SHARES + 1)
    shares = range(max(first, 1), max(first, 1) + SHARES)
    return tuple(SHARE_GRAIN * share for share in shares if SHARE_GRAIN * share < device_sms)


def shares_for(graph: Graph, device_sms: int, mixes: Sequence[Mix]) -> tuple[int, ...]:
    """`attention_sms` of all `mixes`; of too many, those in the middle."""
    found = sorted({sms for mix in mixes for sms in attention_sms(graph, device_sms, mix)})
    spare = max(len(found) - MOST_SHARES, 0)
    return tuple(found[(spare + 1) // 2 : len(found) - spare // 2])


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
