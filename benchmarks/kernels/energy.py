"""The energy of what a loaded GPU does is read from its energy counter, for dense products at several clocks.

One layer of Llama-3-8B: its dense products on 2048 tokens, and decode attention of 704 requests at 1280. A GPU at its
power cap lowers its clock; idle time between bursts lowers mean power, and the clock rises: so the energy of one and
the same product is found at several clocks without touching the card's settings. The energy of the idle time (measured
too) is taken off.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from nanoflow_kernels import device as kernels
from nanoflow_search.hardware.cuda_graphs import CapturedCalls
from nanoflow_search.hardware.sustain import WARM_UP_S, idle_w, sustain

from benchmarks.kernels.cases import (
    CONTEXT,
    DECODES,
    HEADS,
    HIDDEN,
    INNER,
    KV_HEADS,
    SETS,
    TOKENS,
    attention,
    empty,
    normal,
)
from nanoflow_backend.bench import result
from nanoflow_backend.runtime.gpu_meter import GpuMeter

IDLE_SHARES = (0.0, 0.1, 0.2, 0.3, 0.45, 0.6)


def layer_products(scale: float) -> Callable[[int], None]:
    """The four products of a layer, SwiGLU included; weights N(0, scale)."""
    x, attended, h = normal(TOKENS, HIDDEN), normal(TOKENS, HIDDEN), normal(TOKENS, INNER)
    qkv_columns = HIDDEN + 2 * KV_HEADS * (HIDDEN // HEADS)
    shapes = {
        "qkv": (qkv_columns, HIDDEN),
        "o": (HIDDEN, HIDDEN),
        "gate_up": (2 * INNER, HIDDEN),
        "down": (HIDDEN, INNER),
    }
    weights = [{name: normal(*shape) * scale for name, shape in shapes.items()} for _ in range(SETS)]
    qkv, update, inner = empty(TOKENS, qkv_columns), empty(TOKENS, HIDDEN), empty(TOKENS, INNER)

    def products(i: int) -> None:
        kernels.linear(x, weights[i]["qkv"], out=qkv)
        kernels.linear(attended, weights[i]["o"], out=update)
        kernels.linear_swiglu(x, weights[i]["gate_up"], out=inner)
        kernels.linear(h, weights[i]["down"], out=update)

    return products


def main(
    output: Annotated[Path, typer.Option(help="Where the JSON result goes.")],
    duration_s: Annotated[float, typer.Option(help="That is measured, a point.")] = 5.0,
) -> None:
    """Joules of a layer's dense products and of decode attention, and those of the products against the GPU's clock."""
    torch.manual_seed(0)
    meter = GpuMeter()
    torch.zeros(1, device="cuda")
    time.sleep(2)
    idle = idle_w(meter, duration_s)

    products, zeros = layer_products(0.02), layer_products(0.0)
    attend = next(attention("decodes", [(CONTEXT - 1, 1)] * DECODES, 64))

    def both(i: int) -> None:
        products(i)
        attend.call(i)

    points: list[dict[str, Any]] = []
    work = [("products", products, share) for share in IDLE_SHARES]
    work += [("products, weights of zeros", zeros, 0.0)]
    work += [("decode attention", attend.call, share) for share in (0.0, 0.3)]
    work += [("products, then decode attention", both, share) for share in (0.0, 0.3)]
    for name, call, idle_share in work:
        repeated = CapturedCalls(call, SETS)
        used = sustain([repeated], meter, duration_s, warm_s=WARM_UP_S + 0.5, busy=1 - idle_share)
        busy_w = (used.power_w - idle * (1 - used.busy)) / used.busy
        call_s = used.call_s[0]
        points.append(
            {
                "work": name,
                "idle_share": idle_share,
                "sm_clock_mhz": round(used.sm_clock_mhz),
                "mean_power_w": round(used.power_w, 1),
                "busy_power_w": round(busy_w, 1),
                "duration_us": round(1e6 * call_s, 1),
                "energy_mj": round(1e3 * busy_w * call_s, 2),
                "above_idle_mj": round(1e3 * (busy_w - idle) * call_s, 2),
                "seconds": duration_s,
            }
        )
        print(points[-1], flush=True)
    result.write({"idle_power_w": round(idle, 1), "tokens": TOKENS, "points": points}, output)
