"""Plans of two equal halves, each with half of a batch's decodes: to overlap, and to see what cutting alone costs."""

from __future__ import annotations

from msgspec.structs import replace
from nanoflow_search.loads import FLOP_PER_BYTE, SHARE_GRAIN
from nanoflow_search.work import Mix, operation_work

from nanoflow_backend.graph.operation import Graph
from nanoflow_backend.schedule.plan import Schedule
from nanoflow_backend.schedule.presets import overlapped, synchronise

GRANULARITY = 64  # tokens
FLOP_PER_PROMPT_FLOP = 1.9  # of products, while attention computes one of a prompt: 672 to 357 TFLOP/s on an H200
LEAST_SMS = 8


def overlap_memory(graph: Graph, mix: Mix, device_sms: int) -> Schedule:
    """Attention of one half on SMs of its own (balanced_sms) beside all else of the other."""
    tokens, sms = round(mix.tokens), balanced_sms(graph, mix, device_sms)
    return overlapped(graph, tokens, tokens // 2, 0.5, sms, device_sms, GRANULARITY)


def nano_batch_only(graph: Graph, mix: Mix, device_sms: int) -> Schedule:
    """The same launches in the same order, one after the other, each on all SMs."""
    plan = overlap_memory(graph, mix, device_sms)
    launches = tuple(replace(launch, lane="compute", waits=()) for launch in plan.launches)
    return synchronise(replace(plan, launches=launches, partition={}), graph)


def balanced_sms(graph: Graph, mix: Mix, device_sms: int) -> int:
    """With so many SMs attention takes as long as the products on the others: the decodes' reading and the prompts'
    arithmetic, both weighed in operations of products; rounded to what a device grants."""
    attention = next(op for op in graph.operations if op.kernel == "attention")
    reading = operation_work(graph, attention, Mix(mix.decode_tokens, 0, mix.decode_context, 0)).memory_bytes
    prompts = operation_work(graph, attention, Mix(0, mix.prefill_tokens, 0, mix.prefill_context)).flop
    products = sum(operation_work(graph, op, mix).flop for op in graph.operations if op is not attention)
    weighed = FLOP_PER_BYTE * reading + FLOP_PER_PROMPT_FLOP * prompts
    balanced = round(device_sms * weighed / (weighed + products) / SHARE_GRAIN) * SHARE_GRAIN
    return min(max(balanced, LEAST_SMS), device_sms - LEAST_SMS)
