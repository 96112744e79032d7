"""A network's table stands in for collectives that cannot be measured here: it makes points and pairs of a profile.

Times are the table's. What it does not say is assumed, and `ASSUMED` tells so: the energy of a collective where the
table has none of its links, and that collectives and what runs beside them on other SMs share memory bandwidth alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from msgspec.structs import replace

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.network_table import PASSES, NetworkTable, sent_bytes
from nanoflow_backend.graph.operation import Graph, Operation, Resource
from nanoflow_search.cost.devices import DEVICES
from nanoflow_search.cost.work import COLLECTIVES, operation_work
from nanoflow_search.cost.workload import Mix
from nanoflow_search.profile.data import Pair, Profile
from nanoflow_search.profile.load import Point

ASSUMED = "beside a collective on SMs of its own, what runs is slower only as far as memory bandwidth is short"
AMOUNTS = (128, 256, 512, 1024, 2048, 4096, 8192)  # tokens: a table's lines are straight between its sizes
DEVICE = DEVICES["H200-sustained"]  # the only one whose energies are known
SATURATING_SHARE = 0.25  # of the SMs, which read at the memory's full bandwidth


def check_tables(tables: Sequence[NetworkTable], ranks: int) -> None:
    """Raises: ConfigError, tables of other numbers of ranks, or two with times of one collective on as many SMs."""
    if tables and ranks == 1:
        raise ConfigError("network: expected a table where several ranks share the model (--tp), got 1 rank")
    known: dict[tuple[str, int], str] = {}
    for table in tables:
        name = table.header.name
        if table.header.ranks != ranks:
            raise ConfigError(f"network: expected a table of {ranks} ranks, got {name!r} of {table.header.ranks}")
        for collective, sms in dict.fromkeys((time.collective, time.sms) for time in table.times):
            if (other := known.setdefault((collective, sms), name)) is not name:
                raise ConfigError(
                    f"network: both {other!r} and {name!r} have times of {collective} on {sms} SMs: expected one"
                )


def check_sms(tables: Iterable[NetworkTable], device_sms: int) -> None:
    """Raises: ConfigError, a table with times on more SMs than half of a device's: all else runs on the rest."""
    most = device_sms // 2
    for table in tables:
        if (sms := max(time.sms for time in table.times)) > most:
            raise ConfigError(
                f"network: {table.header.name!r} has times on {sms} SMs: expected at most {most}, "
                f"half of the {device_sms} of the device"
            )


def with_network(
    profile: Profile, graph: Graph, tables: Iterable[NetworkTable], mix: Mix, sizes: Sequence[int]
) -> Profile:
    """Return the profile with the collectives of `graph` (a catalogue) as the tables have them.

    They are points on as many SMs as each table's times are of, and pairs with all that may run beside them on other
    SMs. `sizes` of batches are tokens; attention has the contexts of `mix`.

    Raises:
        ConfigError: what `check_sms` raises.
    """
    tables = tuple(tables)
    check_sms(tables, profile.header.device_sms)
    network = [op for op in graph.operations if op.resource is Resource.NETWORK]
    amounts = sorted({*(tokens for tokens in AMOUNTS if tokens < max(sizes)), max(sizes)})
    points = [
        _point(profile, graph, op, table, sms, tokens)
        for table in tables
        for op in network
        for sms in _sms_of(table, op)
        for tokens in amounts
    ]
    with_points = replace(profile, points=(*profile.points, *points))
    return replace(with_points, pairs=(*profile.pairs, *_pairs(with_points, graph, network, mix)))


def network_sms(tables: Iterable[NetworkTable]) -> tuple[int, ...]:
    """Return the numbers of SMs that the tables have times of, ascending."""
    return tuple(sorted({time.sms for table in tables for time in table.times}))


def _sms_of(table: NetworkTable, operation: Operation) -> list[int]:
    parts = COLLECTIVES[operation.kernel]
    wanted = {*parts, "all_reduce"}  # a table without a form takes it for half of an all-reduce
    return sorted({time.sms for time in table.times if time.collective in wanted})


def _point(profile: Profile, graph: Graph, operation: Operation, table: NetworkTable, sms: int, tokens: int) -> Point:
    """Return a collective on the whole rows of `tokens`."""
    header, element = profile.header, profile.header.precision.element_bytes
    values = (graph.values[name] for name in (*operation.inputs, *operation.outputs))
    size = tokens * max(value.width * element(value.dtype) for value in values)
    parts = COLLECTIVES[operation.kernel]
    sent = sum(sent_bytes(part, size, header.tensor_parallel) for part in parts)
    # Beside what is sent, a rank reads and writes its rows of the residual.
    own = len(operation.own_rows) * size / header.tensor_parallel
    bandwidth = DEVICE.memory_bytes_per_s * min(1.0, sms / header.device_sms / SATURATING_SHARE)
    assert DEVICE.power is not None
    link = table.header.link_pj_per_byte
    memory = own + sum(PASSES[part] * size for part in parts)
    link_j = sent * (sum(link) / 2 * 1e-12 if link else DEVICE.power.j_per_network_byte)
    return Point(
        operation=operation.name,
        amount=float(tokens),
        sms=sms,
        duration_us=sum(table.time(part, size, sms).us for part in parts) + 1e6 * own / bandwidth,
        dynamic_j=link_j + (memory if link else own) * DEVICE.power.j_per_byte,
        clock_mhz=max(profile.clocks_mhz),
    )


def _pairs(profile: Profile, graph: Graph, network: Sequence[Operation], mix: Mix) -> Iterator[Pair]:
    """Yield what runs beside each collective: both are slower as far as they ask for more than memory's bandwidth."""
    header = profile.header
    reads = {"decode": mix.decode_context, "prefill": mix.prefill_context}
    for curve in profile.operations:
        name, _, phase = curve.partition("/")
        beside = next((op for op in graph.operations if op.name == name), None)
        if beside is None or beside.resource is Resource.NETWORK:
            continue
        whole = max((p for p in profile.points if p.operation == curve), key=lambda p: (p.sms, p.amount))
        tokens = whole.amount / reads[phase] if phase else whole.amount
        of = {
            "decode": Mix(tokens, 0, mix.decode_context, 0),
            "prefill": Mix(0, tokens, 0, mix.prefill_context),
            "": Mix(0, tokens, 0, mix.prefill_context),
        }[phase]
        work = operation_work(graph, beside, of, header.tensor_parallel, header.precision)
        asked = work.memory_bytes / (1e-6 * whole.duration_us) if whole.duration_us else 0.0
        for op in network:
            mine = [point for point in profile.points if point.operation == op.name]
            for sms in sorted({point.sms for point in mine}):
                point = max((p for p in mine if p.sms == sms), key=lambda p: p.amount)
                sent = operation_work(
                    graph, op, Mix(0, point.amount, 0, 0), header.tensor_parallel, header.precision
                ).memory_bytes
                own = 2 * sent / (1e-6 * point.duration_us)  # read here, and written by the others
                slower = max(1.0, (asked + own) / DEVICE.memory_bytes_per_s)
                watts = sum(1e6 * p.dynamic_j / (p.duration_us * slower) for p in (whole, point) if p.duration_us)
                yield Pair(
                    first=curve,
                    first_sms=max(header.device_sms - sms, 1),
                    second=op.name,
                    second_sms=sms,
                    first_slowdown=slower,
                    second_slowdown=slower,
                    power_w=header.static_w + watts,
                    clock_mhz=max(profile.clocks_mhz),
                )
