"""These plans have two equal halves, each with half of a batch's decodes: to overlap, and to see what cutting costs."""

from __future__ import annotations

from msgspec.structs import replace
from nanoflow_search.plan.partitions import partitions_of
from nanoflow_search.predict.predict import predict
from nanoflow_search.predict.timing_model import TimingModel

from nanoflow_backend.graph.operation import Graph
from nanoflow_backend.schedule.plan import Schedule
from nanoflow_backend.schedule.presets import alternating, overlapped, synchronise

GRANULARITY = 64  # tokens


def overlap_memory(graph: Graph, measured: TimingModel, num_layers: int) -> Schedule:
    """Attention of one half on SMs of its own beside all else of the other: of the profile's partitions, the one in
    which that is predicted to take least."""
    tokens, whole = round(measured.mix.tokens), measured.profile.header.device_sms
    plans = [
        overlapped(graph, tokens, tokens // 2, 0.5, partition["memory"], whole, GRANULARITY)
        for partition in partitions_of(measured.profile, graph)
    ]
    return min(plans, key=lambda plan: predict(plan, measured, num_layers).layer_us)


def nano_batch_only(graph: Graph, plan: Schedule) -> Schedule:
    """The launches of `plan` in the same order, one after the other, each on all SMs."""
    launches = tuple(replace(launch, lane="compute", waits=(), sms=None) for launch in plan.launches)
    return synchronise(replace(plan, launches=launches, partition={}), graph)


def overlap_network(graph: Graph, tokens: int, network_sms: int, device_sms: int) -> Schedule:
    """Collectives of one half on SMs of their own beside the products and attention of the other."""
    partition = {"network": network_sms, "compute": device_sms - network_sms}
    return alternating(graph, tokens, tokens // 2, 0.5, partition, GRANULARITY)
