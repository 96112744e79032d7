"""break_down says where the time of a step goes on a GPU, by torch's profiler."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from nanoflow_backend.engine import Engine
from nanoflow_backend.graph.operation import Operation, Resource
from nanoflow_backend.models.model import build
from nanoflow_backend.schedule.source import find_schedules

STEPS = 10
PRODUCTS = ("nvjet", "gemm", "cutlass")  # in the names of dense products: of cuBLAS's kernels, and of ours
OPERATIONS = {  # by the names of our kernels
    "_decode": "attention of decodes",
    "_merge": "attention of decodes",
    "_prefill": "attention of prefills",
}


class Kernel(NamedTuple):
    """One kernel launch as the profiler saw it."""

    start_us: float
    end_us: float
    name: str


def break_down(engine: Engine, step: Callable[[], object], steps: int = STEPS) -> dict[str, Any]:
    """Profile `steps` calls of `step`, each a step of `engine` on a GPU.

    What the profile itself costs is outside of the steps' times, but not outside of the caller's: `took_s`.
    """
    start_s = time.perf_counter()
    torch.cuda.synchronize()  # so that no step is seen in part
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    kernels = sorted(
        Kernel(event.time_range.start, event.time_range.end, event.name)
        for event in profiled.events()
        if event.device_type == DeviceType.CUDA
    )
    found = summarise(kernels, steps, product_operations(engine))
    return {**found, "took_s": round(time.perf_counter() - start_s, 2)}


def summarise(kernels: Sequence[Kernel], steps: int, products: Sequence[str]) -> dict[str, Any]:
    """`kernels`: of whole steps, by start. `products`: the operations of one step that are dense products, in order."""
    window_us, busy_us, reached_us = kernels[-1].end_us - kernels[0].start_us, 0.0, kernels[0].start_us
    by_operation: defaultdict[str, float] = defaultdict(float)
    by_name: defaultdict[str, list[float]] = defaultdict(list)
    operations = _operations(kernels, steps, products)
    for kernel, operation in zip(kernels, operations, strict=True):
        took_us = kernel.end_us - kernel.start_us
        by_name[kernel.name].append(took_us)
        by_operation[operation] += took_us
        busy_us += max(kernel.end_us - max(kernel.start_us, reached_us), 0.0)
        reached_us = max(reached_us, kernel.end_us)
    return {
        "profiled_steps": steps,
        "step_ms": round(window_us / steps / 1e3, 3),
        "idle_share": round(1 - busy_us / window_us, 5),
        "operations_ms_per_step": _descending({name: us / steps / 1e3 for name, us in by_operation.items()}),
        "kernels": [
            {
                "kernel": name[:120],
                "ms_per_step": round(sum(times) / steps / 1e3, 4),
                "per_step": len(times) / steps,
                "mean_us": round(mean(times), 2),
            }
            for name, times in sorted(by_name.items(), key=lambda item: -sum(item[1]))
        ],
    }


def product_operations(engine: Engine) -> list[str]:
    """The names of a full step's dense products, in the order in which they run; none if two lanes have some."""
    config, device = engine.config, engine.executor.device
    model = build(engine.model_config, config.tensor_parallel)
    schedule = find_schedules(config, model, device.name, device.sms)[-1]
    in_head = [operation.name for operation in model.head.operations if _is_dense(operation)]
    order = [(model.in_order[layer], schedule.launches[number]) for layer, number in schedule.unroll(model.num_layers)]
    products = [launch for graph, launch in order if launch.operation in graph and _is_dense(graph[launch.operation])]
    one_lane = len({launch.lane for launch in products}) == 1
    return [launch.operation for launch in products] + in_head if one_lane else []


def _is_dense(operation: Operation) -> bool:
    """Experts' products are several kernels, which have names of their own."""
    return operation.resource is Resource.COMPUTE and "grouped_" not in operation.kernel


def _operations(kernels: Sequence[Kernel], steps: int, products: Sequence[str]) -> list[str]:
    """The operation of each kernel. A product's name does not tell which one it is; they come in the order of
    `products`, if each launch is one kernel."""
    found = [kernel for kernel in kernels if _is_product(kernel.name)]
    expected = list(products) * steps
    names = iter(expected if len(found) == len(expected) else ["linear"] * len(found))
    return [next(names) if _is_product(kernel.name) else _operation(kernel.name) for kernel in kernels]


def _is_product(name: str) -> bool:
    return any(word in name for word in PRODUCTS)


def _operation(name: str) -> str:
    if not name.startswith("_"):
        return "the rest"  # torch's own kernels, copies
    return OPERATIONS.get(name, name.removeprefix("_"))


def _descending(times: Mapping[str, float]) -> dict[str, float]:
    return {name: round(ms, 4) for name, ms in sorted(times.items(), key=lambda item: -item[1])}
