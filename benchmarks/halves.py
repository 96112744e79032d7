"""Plans of two equal halves, each with half of a batch's decodes: to overlap, and to see what cutting alone costs."""

from __future__ import annotations

from msgspec.structs import replace
from nanoflow_search.devices import DEVICES
from nanoflow_search.work import Mix, operation_work

from nanoflow_backend.graph.operation import Graph
from nanoflow_backend.runtime.green_contexts import GRAIN
from nanoflow_backend.schedule.plan import Schedule
from nanoflow_backend.schedule.presets import overlapped, synchronise

GRANULARITY = 64  # tokens
# By SM of an H200. What a few SMs read beside products was set so that the rule below gives the sizes that won by hand:
# 32 SMs at 1024/512 (2,048 tokens), 36 at 512/1024 (1,536). Prompts: benchmarks/results/kernels_h200.json.
READ_BYTES_PER_S = 78e9
PROMPT_FLOP_PER_S = 357e12 / 132
PRODUCT_FLOP_PER_S = DEVICES["H200-sustained"].flop_per_s / 132


def overlap_memory(graph: Graph, mix: Mix, device_sms: int) -> Schedule:
    """Attention of one half on SMs of its own (see attention_sms) beside all else of the other.

    Raises: ScheduleError, a batch that cannot be cut at a multiple of GRANULARITY.
    """
    tokens, sms = round(mix.tokens), attention_sms(graph, mix, device_sms)
    return overlapped(graph, tokens, tokens // 2, 0.5, sms, device_sms, GRANULARITY)


def nano_batch_only(graph: Graph, mix: Mix, device_sms: int) -> Schedule:
    """The same launches in the same order, one after the other, each on all SMs."""
    plan = overlap_memory(graph, mix, device_sms)
    launches = tuple(replace(launch, lane="compute", waits=()) for launch in plan.launches)
    return synchronise(replace(plan, launches=launches, partition={}), graph)


def attention_sms(graph: Graph, mix: Mix, device_sms: int) -> int:
    """Of the shares that the device grants, the smallest with which attention and products are both done soonest.

    Attention's time is that of the decodes' reading, up to the device's bandwidth, and of the prompts' arithmetic.
    """
    attention = next(op for op in graph.operations if op.kernel == "attention")
    read = operation_work(graph, attention, Mix(mix.decode_tokens, 0, mix.decode_context, 0)).memory_bytes
    prompt_flop = operation_work(graph, attention, Mix(0, mix.prefill_tokens, 0, mix.prefill_context)).flop
    product_flop = sum(operation_work(graph, op, mix).flop for op in graph.operations if op is not attention)
    bandwidth = DEVICES["H200-sustained"].memory_bytes_per_s

    def longer_s(sms: int) -> float:
        reading_s = read / min(sms * READ_BYTES_PER_S, bandwidth)
        return max(
            reading_s + prompt_flop / (sms * PROMPT_FLOP_PER_S),
            product_flop / ((device_sms - sms) * PRODUCT_FLOP_PER_S),
        )

    shares = range(GRAIN, device_sms - GRAIN + 1)
    return min((sms for sms in shares if not sms % GRAIN or not (device_sms - sms) % GRAIN), key=longer_s)
