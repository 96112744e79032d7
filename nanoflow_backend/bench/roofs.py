"""A roof is a rate that a device reaches when it does nothing else, measured in the process of the benchmark.

B tokens of a full step, E experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from math import prod

import msgspec
import torch
from torch import Tensor

from nanoflow_backend.config.model_config import ModelConfig
from nanoflow_backend.config.precision import Precision
from nanoflow_backend.graph.model import Model
from nanoflow_backend.graph.operation import Graph
from nanoflow_backend.runtime.gpu_meter import find_gpu_meter

# A GPU under load is held by its power cap: only after about a second do clock and rate stay what they are.
WARM_S = {"cuda": 1.0, "cpu": 0.05}
GEMM_S = {"cuda": 3.0, "cpu": 0.2}
READ_S = {"cuda": 1.0, "cpu": 0.1}
READ_BYTES = {"cuda": 1 << 30, "cpu": 64 << 20}  # far beyond any cache, and little beside a full KV cache


class Rate(msgspec.Struct, frozen=True):
    """Of one kind of work, sustained. Power and clock are None without a GPU's meter."""

    per_s: float
    seconds: float  # that it was measured for
    mean_power_w: float | None
    sm_clock_mhz: int | None


def _matrices(graph: Graph) -> list[tuple[int, ...]]:
    """The shapes of the weights of a graph's matrix products."""
    shapes = {parameter.name: parameter.shape for parameter in graph.parameters}
    products = [op for op in graph.operations if op.kernel.startswith(("linear", "grouped_"))]
    return [shapes[op.parameters[0]] for op in products]


def gemm_flop_per_s(model: Model, config: ModelConfig, tokens: int, precision: Precision, device: str) -> Rate:
    """The matrix products of a layer of each kind on B `tokens`, by turns.

    Weights are N(0, 0.02) as in `weights.dummy`, inputs N(0, 1).

    A layer's weights do not fit in a cache, so every product reads its own. Experts get equal shares of the tokens.
    """
    products: list[Callable[[], object]] = []
    flop = 0
    dtype = getattr(torch, precision.weights)
    for shape in (shape for kind in model.layers for shape in _matrices(kind)):
        weight = torch.empty(shape, dtype=dtype, device=device).normal_(0, 0.02)
        experts = shape[:-2]  # () or (E,)
        rows = -(-tokens * config.experts_per_token // experts[0]) if experts else tokens
        x = torch.randn((*experts, rows, shape[-1]), dtype=dtype, device=device)
        y = torch.empty((*experts, rows, shape[-2]), dtype=dtype, device=device)
        products.append(_product(x, weight, y))
        flop += 2 * rows * prod(shape)

    def layer() -> None:
        for product in products:
            product()

    return _sustained(layer, flop, GEMM_S[device], device)


def memory_bytes_per_s(device: str) -> Rate:
    """The better of a sum over memory and of a copy, which counts what it reads and what it writes."""
    memory = torch.zeros(READ_BYTES[device] // 4, dtype=torch.float32, device=device)
    copy, total = torch.empty_like(memory), torch.empty((), dtype=torch.float32, device=device)
    return max(
        _sustained(lambda: torch.sum(memory, 0, out=total), READ_BYTES[device], READ_S[device], device),
        _sustained(lambda: copy.copy_(memory), 2 * READ_BYTES[device], READ_S[device], device),
        key=lambda rate: rate.per_s,
    )


def _product(x: Tensor, weight: Tensor, y: Tensor) -> Callable[[], object]:
    return lambda: torch.matmul(x, weight.mT, out=y)


def _sustained(work: Callable[[], object], amount: float, seconds: float, device: str) -> Rate:
    """`amount` is what one call of `work` does."""
    meter = find_gpu_meter() if device == "cuda" else None
    _queue(work, WARM_S[device])
    _wait(device)
    before, start_s = meter.read() if meter else None, time.perf_counter()
    calls = _queue(work, seconds)
    after = meter.read() if meter else None  # while it still runs
    _wait(device)
    took_s = time.perf_counter() - start_s
    power_w = (after.energy_j - before.energy_j) / (after.time_s - before.time_s) if after and before else None
    return Rate(
        per_s=amount * calls / took_s,
        seconds=round(took_s, 2),
        mean_power_w=round(power_w, 1) if power_w is not None else None,
        sm_clock_mhz=after.sm_clock_mhz if after else None,
    )


def _queue(work: Callable[[], object], seconds: float) -> int:
    """Call `work` for so long; returns how often. On a GPU a call returns at once, until the driver's queue is full."""
    calls, start_s = 0, time.perf_counter()
    while time.perf_counter() - start_s < seconds:
        work()
        calls += 1
    return calls


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
