"""A shard's profile is put together from that of another model, where none of its own was taken.

Products take the other's time for as much arithmetic, small operations for as many bytes, attention for as many bytes
of the KV cache or pairs of query and key. What shapes do to tiles is lost: this is an estimate and no measurement.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from msgspec.structs import replace
from nanoflow_search.profile.data import Profile
from nanoflow_search.request import SearchRequest

from nanoflow_backend.graph.operation import Graph, Kind, Operation, Resource
from nanoflow_backend.schedule.file import fingerprint


def shard_profile(other: Profile, layer: Graph, shard: SearchRequest) -> Profile:
    """Return the profile of one rank of `shard` by `other`, which was taken of `layer` on a single rank.

    Collectives are left out. An operation that the other layer does not have by name takes the times of the one whose
    name it begins with ("o.columns" those of "o").

    Raises:
        ValueError: the two differ in precision, or there is no operation to take times from.
    """
    if other.header.precision != shard.precision:
        raise ValueError(f"profile: expected one in {shard.precision}, got one in {other.header.precision}")
    header = replace(other.header, model_fingerprint=fingerprint(shard.model.layer), tensor_parallel=shard.ranks)
    points, pairs = [], []
    for op in shard.operations.operations:
        if op.resource is Resource.NETWORK:
            continue
        name = op.name if op.name in layer else op.name.partition(".")[0]
        if name not in layer:
            raise ValueError(f"profile: has no operation to take the times of {op.name} from")
        ratios = _ratios(layer, layer[name], shard.operations, op)
        for point in other.points:
            of, slash, phase = point.operation.partition("/")
            if of == name:
                time, amount = ratios[phase]
                points.append(
                    replace(
                        point,
                        operation=f"{op.name}{slash}{phase}",
                        amount=point.amount * amount,
                        duration_us=point.duration_us * time,
                        dynamic_j=point.dynamic_j * time,
                    )
                )
        pairs += [replace(pair, first=op.name) for pair in other.pairs if pair.first == name]
    return Profile(header=header, points=tuple(points), pairs=tuple(pairs))


def _ratios(layer: Graph, known: Operation, shard: Graph, wanted: Operation) -> Mapping[str, tuple[float, float]]:
    """By attention's phase, or "": how the time of a launch, and the amount that it is of, differ."""
    if known.kernel == "attention":
        q, pages = (layer.values[name].width / shard.values[name].width for name in known.inputs[:2])
        return {"decode": (1.0, pages), "prefill": (1.0, q)}
    if known.resource is Resource.COMPUTE:
        return {"": (_weight(shard, wanted) / _weight(layer, known), 1.0)}
    return {"": (_row(shard, wanted) / _row(layer, known), 1.0)}


def _weight(graph: Graph, op: Operation) -> int:
    return prod(next(p.shape for p in graph.parameters if p.name == op.parameters[0]))


def _row(graph: Graph, op: Operation) -> int:
    values = (graph.values[name] for name in (*op.inputs, *op.outputs))
    return sum(value.width for value in values if value.kind is not Kind.BATCH)
