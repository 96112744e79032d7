"""A roof is a rate that a device reaches when it does nothing else, measured in the process of the benchmark.

B tokens of a full step, E experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from math import prod

import msgspec
import torch
from torch import Tensor

from nanoflow_backend.config.model_config import ModelConfig
from nanoflow_backend.config.quantization import FP8
from nanoflow_backend.graph.model import Model
from nanoflow_backend.graph.operation import Graph, Resource
from nanoflow_backend.models.random_values import fill_normal
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


def _matrices(graph: Graph, dtype: str) -> list[tuple[int, ...]]:
    """The shapes of the weights of a graph's matrix products; with `dtype` FP8, of those that are in FP8."""
    weights = {parameter.name: parameter for parameter in graph.parameters}
    products = [weights[op.parameters[0]] for op in graph.operations if op.resource is Resource.COMPUTE]
    return [weight.shape for weight in products if dtype != FP8 or weight.dtype == FP8]


def gemm_flop_per_s(model: Model, config: ModelConfig, tokens: int, dtype: str, device: str) -> Rate:
    """The matrix products of a layer of each kind on B `tokens`, by turns, all of operands of `dtype`: of FP8 those
    that the model has in FP8, else all of them.

    Weights are N(0, 0.02) as in `weights.dummy`, inputs N(0, 1); those of FP8 have a scale for each row, and the better
    of the library and of our own kernel counts: in 16 bits the library is as fast as any.

    A layer's weights do not fit in a cache, so every product reads its own. Experts get equal shares of the tokens.
    """

    def of_layer(make: Callable[..., Callable[[], object]]) -> Rate:
        products: list[Callable[[], object]] = []
        flop = 0
        for *experts, columns, width in (shape for kind in model.layers for shape in _matrices(kind, dtype)):
            rows = -(-tokens * config.experts_per_token // experts[0]) if experts else tokens
            products.append(make(prod(experts), rows, columns, width, getattr(torch, dtype), device))
            flop += 2 * rows * prod(experts) * columns * width

        def layer() -> None:
            for product in products:
                product()

        return _sustained(layer, flop, GEMM_S[device], device)

    makers = [_product] if dtype != FP8 else [partial(_scaled_product, multiply=m) for m in _scaled_multiplies(device)]
    return max(map(of_layer, makers), key=lambda rate: rate.per_s)


def memory_bytes_per_s(device: str) -> Rate:
    """The better of a sum over memory and of a copy, which counts what it reads and what it writes."""
    memory = torch.zeros(READ_BYTES[device] // 4, dtype=torch.float32, device=device)
    copy, total = torch.empty_like(memory), torch.empty((), dtype=torch.float32, device=device)
    return max(
        _sustained(lambda: torch.sum(memory, 0, out=total), READ_BYTES[device], READ_S[device], device),
        _sustained(lambda: copy.copy_(memory), 2 * READ_BYTES[device], READ_S[device], device),
        key=lambda rate: rate.per_s,
    )


def _product(
    matrices: int, rows: int, columns: int, width: int, dtype: torch.dtype, device: str
) -> Callable[[], object]:
    shape = () if matrices == 1 else (matrices,)  # a batched product of one is slower
    weight = torch.empty((*shape, columns, width), dtype=dtype, device=device).normal_(0, 0.02)
    x = torch.randn((*shape, rows, width), dtype=dtype, device=device)
    y = torch.empty((*shape, rows, columns), dtype=dtype, device=device)
    return lambda: torch.matmul(x, weight.mT, out=y)


def _scaled_product(
    matrices: int,
    rows: int,
    columns: int,
    width: int,
    dtype: torch.dtype,
    device: str,
    multiply: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], object],
) -> Callable[[], object]:
    """Products of a scale for each row of both operands, which cost no more than a scale for all."""
    weight = fill_normal(torch.empty((matrices, columns, width), dtype=dtype, device=device))
    x = fill_normal(torch.empty((matrices, rows, width), dtype=dtype, device=device))
    y = torch.empty((matrices, rows, columns), dtype=torch.bfloat16, device=device)
    x_scale, weight_scale = torch.ones((rows, 1), device=device), torch.ones(columns, device=device)

    def run() -> None:
        for one, matrix, out in zip(x, weight, y, strict=True):
            multiply(one, x_scale, matrix, weight_scale, out)

    return run


def _scaled_multiplies(device: str) -> list[Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], object]]:
    """What writes x weight^T to the last argument, as in scaled_linear: the library, and on a GPU our kernel."""

    def library(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, out: Tensor) -> None:
        torch._scaled_mm(x, weight.mT, x_scale, weight_scale[None], out_dtype=out.dtype, use_fast_accum=True, out=out)

    if device == "cpu":
        return [library]
    from nanoflow_kernels import device as kernels  # needs a GPU

    return [library, lambda *operands: kernels.scaled_linear(*operands[:-1], out=operands[-1])]


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
