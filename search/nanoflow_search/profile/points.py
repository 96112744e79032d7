"""The points to measure of a model are few, and chosen so that times are nearly straight lines between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from nanoflow_backend.config.precision import BFLOAT16, Precision
from nanoflow_backend.graph.operation import Graph, Operation, Resource
from nanoflow_search.cost.devices import FP8_TIME
from nanoflow_search.cost.work import layer_work
from nanoflow_search.cost.workload import Mix
from nanoflow_search.profile.load import Load, LoadsToMeasure, SoloLoad

TILE_ROWS, TILE_COLUMNS = 128, 256  # the tile of a dense product that one SM works on at a time
TOKEN_STEPS = (128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)  # tokens
FEW_WAVES = 4  # waves of tiles: beyond so many, a last wave that is not full hardly counts
CAPS = (0.125, 0.25, 0.375, 0.5, 1.0)  # shares of the SMs that attention may use beside products
PAIR_CAP = 0.25  # the one share that is measured beside short launches
PAIR_TOKENS = 1024  # tokens of a product in a pair: about a nano-batch
NUM_SHARES = 4  # how many sizes of attention's partition are measured for one mix
MOST_SHARES = 5  # the most sizes in one profile: each costs some 35 points
SHARE_GRAIN = 4  # SMs by which the sizes of a partition differ
# Operations of one SM in the time in which attention reads a byte on another: 56 side by side
# (partition_placement_h200.json, 32 of 132 SMs), and a quarter more, since attention waits for products in every layer.
# Of 16-bit operands: an operation on e4m3 ones takes FP8_TIME of that.
FLOP_PER_BYTE = 70.0
ENOUGH_SMS_SHARE = 1 / 3  # 40 of 132 SMs read 0.93 of what all do (kernels_decode_partition_h200.json)
PARTITION_TOKENS = (512, 640, 768, 896, 1024, 1152, 1280, 1536)  # nano-batches: times grow in steps of tiles


class Sweep(NamedTuple):
    """Amounts to measure alone on each of some numbers of SMs (None: all of them).

    Amounts are tokens; those of attention are shares of what the mix's decodes or prompts read.
    """

    amounts: Sequence[float]
    sms: Sequence[int | None] = (None,)
    two_clocks: Callable[[float, int | None], bool] = lambda amount, sms: False


class Partner(NamedTuple):
    """Attention to measure beside an operation on `tokens` and `own_sms`."""

    tokens: int
    own_sms: int | None
    phase: str  # "decode" or "prefill"
    share: float  # of what the mix's decodes or prompts read
    sms: int | None


class Row(NamedTuple):
    """What to measure of all operations of one kind."""

    sweeps: Sequence[Sweep]
    partners: Sequence[Partner] = ()


# The kinds are attention's two phases and the resources: decode, prefill, compute, memory, network.
Table = Mapping[str, Row]


def shared_loads(graph: Graph, device_sms: int, mix: Mix, largest_tokens: int = 4096) -> LoadsToMeasure:
    """Return the loads for lanes that share SMs, on batches of up to `largest_tokens` tokens.

    Attention reads what it reads in a batch of `mix`.
    """
    caps, few = [_cap(device_sms, share) for share in CAPS], _cap(device_sms, PAIR_CAP)
    limits = [cap for cap in caps if cap]

    def table(op: Operation) -> Table:
        amounts = _amounts(graph, op, device_sms, largest_tokens) if op.resource is Resource.COMPUTE else [0]
        twice = {amounts[0], min(512, largest_tokens), amounts[-1]}
        attention = Row(
            [
                Sweep((0.125, 0.25, 0.5, 1), two_clocks=lambda share, _: share == 1),
                Sweep((0.5,), limits, two_clocks=lambda *_: True),
                Sweep((1,), limits),
            ]
        )
        return {
            "decode": attention,
            "prefill": attention,
            "compute": Row(
                [Sweep(amounts, two_clocks=lambda tokens, _: tokens in twice)],
                [
                    *(Partner(PAIR_TOKENS, None, "decode", 1, cap) for cap in caps),
                    *(Partner(PAIR_TOKENS, None, "prefill", 1, cap) for cap in (few, None)),
                ],
            ),
            "memory": Row([Sweep((128, 1024, largest_tokens))], [Partner(PAIR_TOKENS, None, "decode", 1, few)]),
            "network": Row([Sweep((largest_tokens,))]),
        }

    return _listed(graph, mix, table)


def partition_loads(
    graph: Graph,
    device_sms: int,
    mix: Mix,
    largest_tokens: int = 2048,
    sizes: Sequence[int] = (),
    network_sms: Sequence[int] = (),
) -> LoadsToMeasure:
    """Return the loads for plans that give attention SMs of its own, one of `sizes`, and all else the rest.

    Sequential plans need them too. Operations in a partition still share the memory: the two sizes in the middle are
    measured in pairs, and show by how much that slows them down. With `network_sms` collectives have SMs of their own,
    too, the first of these numbers in what is measured beside them; attention then has its own ones or shares the rest.
    """
    sizes = sizes or attention_sms(graph, device_sms, mix)
    middle = (len(sizes) - 1) // 2
    likely = sorted(sizes)[middle : middle + 2]
    taken = network_sms[0] if network_sms else 0
    rests = [device_sms - taken - sms for sms in ((0, *sizes) if network_sms else sizes)]
    half, least_rest = min(PAIR_TOKENS, largest_tokens), min(rests)

    def up_to(*tokens: int) -> list[int]:
        return sorted({min(n, largest_tokens) for n in tokens})

    alone, own = up_to(256, 512, half, largest_tokens), up_to(*PARTITION_TOKENS)
    whole = Sweep((0.5, 1), two_clocks=lambda share, _: share == 1)
    table: Table = {
        "decode": Row([whole, Sweep((0.5, 1), sizes, two_clocks=lambda share, _: share == 0.5)]),
        "prefill": Row([whole, Sweep((0.5,), sizes, two_clocks=lambda _, sms: sms == likely[0])]),
        "compute": Row(
            [
                Sweep(alone, two_clocks=lambda tokens, _: tokens in (alone[0], alone[-1])),
                Sweep(
                    own,
                    rests,
                    two_clocks=lambda tokens, sms: tokens == half and device_sms - taken - (sms or 0) in likely,
                ),
            ],
            [
                *(Partner(half, device_sms - taken - sms, "decode", 0.5, sms) for sms in likely),
                Partner(half, device_sms - taken - likely[0], "prefill", 0.5, likely[0]),
            ],
        ),
        "memory": Row(
            [Sweep(up_to(512, largest_tokens), (None, least_rest))],
            [Partner(half, device_sms - taken - likely[0], "decode", 0.5, likely[0])],
        ),
        "network": Row(
            [Sweep(alone, (None, *network_sms))] if network_sms else [Sweep((largest_tokens,), (None, least_rest))]
        ),
    }
    listed = _listed(graph, mix, lambda _: table)
    beside = _beside_collectives(graph, mix, half, device_sms - taken, taken) if taken else ()
    return listed._replace(together=(*listed.together, *beside))


def _beside_collectives(graph: Graph, mix: Mix, tokens: int, rest: int, own: int) -> Iterator[tuple[Load, Load]]:
    """Yield each product, and attention of half of the decodes, on `rest` SMs beside each collective on its `own`."""
    attention = next(op.name for op in graph.operations if op.kernel == "attention")
    reads = mix.decode_tokens * mix.decode_context / 2
    products = [Load(op.name, tokens, rest) for op in graph.operations if op.resource is Resource.COMPUTE]
    decodes = [Load(f"{attention}/decode", reads, rest)] if reads else []
    for op in graph.operations:
        if op.resource is Resource.NETWORK:
            yield from ((load, Load(op.name, tokens, own)) for load in (*products, *decodes))


def _listed(graph: Graph, mix: Mix, table: Callable[[Operation], Table]) -> LoadsToMeasure:
    """Return the loads that the table asks for, operation by operation; attention without decodes or prompts has no
    such phase."""
    alone: list[SoloLoad] = []
    together: list[tuple[Load, Load]] = []
    attention = next(op.name for op in graph.operations if op.kernel == "attention")
    reads = {
        "decode": mix.decode_tokens * mix.decode_context,
        "prefill": mix.prefill_tokens * mix.prefill_context,
    }
    for op in graph.operations:
        kinds = reads if op.name == attention else [op.resource.value]
        for kind in kinds:
            row, unit = table(op)[kind], reads.get(kind, 1)
            curve = f"{op.name}/{kind}" if kind in reads else op.name
            alone += [
                SoloLoad(Load(curve, amount * unit, sms), sweep.two_clocks(amount, sms))
                for sweep in row.sweeps
                for sms in sweep.sms
                for amount in sweep.amounts
                if unit
            ]
            together += [
                (Load(op.name, p.tokens, p.own_sms), Load(f"{attention}/{p.phase}", p.share * reads[p.phase], p.sms))
                for p in row.partners
                if reads[p.phase]
            ]
    return LoadsToMeasure(tuple(alone), tuple(together))


def attention_sms(graph: Graph, device_sms: int, mix: Mix, precision: Precision = BFLOAT16) -> tuple[int, ...]:
    """Return the sizes of attention's partition that are worth measuring, ascending, in SMs.

    They lie around the size with which attention reads for as long as the products compute on the other SMs, and end
    where attention saturates the memory's bandwidth.
    """
    works = layer_work(graph, mix, precision=precision)
    reading = FLOP_PER_BYTE * sum(works[op.name].memory_bytes for op in graph.operations if op.kernel == "attention")
    of_products = [works[op.name] for op in graph.operations if op.resource is Resource.COMPUTE]
    products = sum(work.flop + FP8_TIME * work.fp8_flop for work in of_products)
    balanced = device_sms * reading / (reading + products)
    most = int(ENOUGH_SMS_SHARE * device_sms / SHARE_GRAIN)
    first = min(round(balanced / SHARE_GRAIN - (NUM_SHARES - 1) / 2), most - NUM_SHARES + 1)
    shares = range(max(first, 1), max(first, 1) + NUM_SHARES)
    return tuple(SHARE_GRAIN * share for share in shares if SHARE_GRAIN * share < device_sms)


def attention_sms_for(
    graph: Graph, device_sms: int, mixes: Sequence[Mix], precision: Precision = BFLOAT16
) -> tuple[int, ...]:
    """Return the sizes of `attention_sms` for all `mixes`; where they are too many, those in the middle."""
    found = sorted({sms for mix in mixes for sms in attention_sms(graph, device_sms, mix, precision)})
    spare = max(len(found) - MOST_SHARES, 0)
    return tuple(found[(spare + 1) // 2 : len(found) - spare // 2])


def _cap(device_sms: int, share: float) -> int | None:
    return None if share == 1 else max(4, round(device_sms * share / 4) * 4)


def _amounts(graph: Graph, op: Operation, device_sms: int, largest: int) -> list[int]:
    """Return the tokens at which the time of a product bends: those that fill a wave of tiles, those with one more tile
    of rows, and TOKEN_STEPS."""
    columns = next(p.shape[-2] for p in graph.parameters if p.name == op.parameters[0])
    across = -(-columns // TILE_COLUMNS)
    found = {tokens for tokens in TOKEN_STEPS if tokens < largest} | {largest}
    for wave in range(1, FEW_WAVES + 1):
        rows = wave * device_sms // across
        found |= {TILE_ROWS * r for r in (rows, rows + 1) if 0 < TILE_ROWS * r <= largest}
    return sorted(found)
