"""Decode attention runs on some SMs and a product on the rest, to see which SMs a lane should have.

`neighbours` is how the engine cuts it (runtime/green_contexts.py); `whole GPCs` is what the driver gives when it is
asked for a share as it is. How they are measured: search/nanoflow_search/hardware/sustain.py.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from nanoflow_kernels import device as kernels
from nanoflow_search.hardware.cuda_graphs import CapturedCalls
from nanoflow_search.hardware.sustain import sustain

from benchmarks.kernels.cases import (
    CONTEXT,
    DECODES,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INNER,
    KV_HEADS,
    SETS,
    TOKENS,
    empty,
    normal,
    paged_requests,
)
from nanoflow_backend.bench import result
from nanoflow_backend.runtime.device import find_device
from nanoflow_backend.runtime.gpu_meter import GpuMeter
from nanoflow_backend.runtime.green_contexts import Shares, call, split, streams_of

PAGE_TOKENS = 64
ATTENTION_SMS = (28, 32, 36, 40)


def whole_gpcs(driver: Any, device: Any, shares: Shares) -> dict[str, list[Any]]:
    """The first share split off as the driver likes; it gives multiples of 8 SMs on Hopper, so one side must be one."""
    whole = call(driver.cuDeviceGetDevResource, device, driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM)
    (lane, sms), (other, _) = sorted(shares, key=lambda share: share[1] % 8 > 0)
    found, _, rest = call(driver.cuDevSmResourceSplitByCount, 1, whole, 0, sms)
    return {lane: [found[0]], other: [rest]}


def main(
    output: Annotated[Path, typer.Option(help="Where the JSON result goes.")],
    attention_sms: Annotated[list[int] | None, typer.Option(help="Repeatable; default: 28, 32, 36, 40.")] = None,
    duration_s: Annotated[float, typer.Option(help="That is measured of each.")] = 0.7,
) -> None:
    """Decode attention on SMs of its own beside a product on the rest, placed as neighbours and as whole GPCs."""
    driver, meter, device_sms = import_module("cuda.bindings.driver"), GpuMeter(), find_device("cuda").sms
    assert device_sms is not None
    positions, slots, table, num_pages = paged_requests([(CONTEXT - 1, 1)] * DECODES, PAGE_TOKENS)
    pages = [normal(num_pages, 2, KV_HEADS, PAGE_TOKENS, HEAD_DIM) for _ in range(SETS)]
    q, attended = normal(DECODES, HEADS * HEAD_DIM), empty(DECODES, HEADS * HEAD_DIM)
    x, inner = normal(TOKENS, HIDDEN), empty(TOKENS, INNER)
    weights = [normal(2 * INNER, HIDDEN) * 0.02 for _ in range(SETS)]
    read_bytes = DECODES * CONTEXT * KV_HEADS * HEAD_DIM * 2 * pages[0].element_size()
    points = []
    for sms in attention_sms or ATTENTION_SMS:
        rest = device_sms - sms
        plan = kernels.plan_attention(positions, slots, pages[0], HEADS, num_sms=sms)

        def attend(i: int, plan: Any = plan, sms: int = sms) -> None:
            kernels.attention(q, pages[i], positions, slots, table, out=attended, num_sms=sms, plan=plan)

        def multiply(i: int, rest: int = rest) -> None:
            kernels.linear_swiglu(x, weights[i], out=inner, num_sms=rest)

        for name, cut in (("neighbours", split), ("whole GPCs", whole_gpcs)):
            streams = streams_of(driver, cut, (("memory", sms), ("compute", rest)))
            works = [CapturedCalls(attend, SETS, streams["memory"]), CapturedCalls(multiply, SETS, streams["compute"])]
            alone, both = (sustain(some, meter, duration_s) for some in (works[:1], works))
            point = {
                "placement": name,
                "attention_sms": sms,
                "attention_alone_gb_per_s": round(read_bytes / alone.call_s[0] / 1e9, 1),
                "attention_gb_per_s": round(read_bytes / both.call_s[0] / 1e9, 1),
                "product_tflop_per_s": round(4 * TOKENS * HIDDEN * INNER / both.call_s[1] / 1e12, 1),
                "sm_clock_mhz": round(both.sm_clock_mhz),
                "mean_power_w": round(both.power_w, 1),
            }
            print(point, flush=True)
            points.append(point)
    loads = {"attention": f"{DECODES} decodes of {CONTEXT}", "product": f"gate_up with SwiGLU, {TOKENS} tokens"}
    result.write({**loads, "points": points}, output)
