"""The cost table shows what bounds a model's throughput on each device: `nanoflow-search analyze`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from nanoflow_search.cost.devices import DEVICES, GpuSpec
from nanoflow_search.cost.model import CostModel
from nanoflow_search.cost.roofs import roofs
from nanoflow_search.cost.work import layer_work
from nanoflow_search.cost.workload import MeanWorkload
from nanoflow_search.request import SearchRequest

COST_COLUMNS = (
    *("device", "workload", "B_dense", "T_compute", "T_mem", "T_net", "T_R"),
    *("optimal", "sequential", "overlapped", "at most", "bound by"),
)


def show_cost_table(request: SearchRequest, names: list[str], dense_batch_tokens: int | None) -> None:
    """Print one row for each device and workload. `names` are those of the device table, none for all of them.

    Raises:
        ValueError: a device is not in the table.
    """
    if unknown := set(names) - DEVICES.keys():
        raise ValueError(f"device: expected one of {', '.join(DEVICES)}, got {', '.join(sorted(unknown))}")
    devices = [DEVICES[name] for name in names] or list(DEVICES.values())
    table = Table(
        title=f"{request.name}, {request.size.parameters / 1e9:.2f}e9 parameters of {request.size.weight_bytes:.2g} "
        f"bytes, KV cache {request.precision.kv}, TP {request.ranks}"
    )
    for column in COST_COLUMNS:
        table.add_column(
            column, no_wrap=True, justify="left" if column in ("device", "workload", "bound by") else "right"
        )
    for device in devices:
        for workload in request.parsed:
            table.add_row(device.name, *_row(request, device, workload, dense_batch_tokens))
    console = Console(width=max(Console().width, 150))  # a pipe has no width of its own
    console.print(table)
    console.print(
        "T_compute, T_mem, T_net (ms an iteration) and T_R are Eq. 1-4, optimal is Eq. 5, tokens/s a GPU. sequential "
        "and overlapped are a steady batch, operation by operation, tokens/s a GPU, with the power cap where known.",
        soft_wrap=True,
        style="dim",
    )


def _row(request: SearchRequest, device: GpuSpec, workload: MeanWorkload, tokens: int | None) -> tuple[str, ...]:
    size, model, tp = request.size, request.model, request.ranks
    cost = CostModel(size, device, tp)
    name = f"{workload.prompt_tokens:g}/{workload.output_tokens:g}"
    if size.parameters * size.weight_bytes > tp * device.memory_bytes:
        return (name, *[""] * 9, "weights do not fit")
    if size.fp8_share and device.fp8_flop_per_s is None:
        return (name, *[""] * 9, "no FP8 products")
    batch = tokens or cost.dense_batch_tokens(workload)
    works = layer_work(model.layer, workload.mix(batch), tp, request.precision)
    limits = roofs(model.layer, works, device, model.num_layers)
    return (
        name,
        f"{batch:.0f}",
        *(f"{1e3 * seconds:.1f}" for seconds in (cost.compute_s(batch), cost.memory_s(), cost.network_s(batch))),
        f"{cost.memory_to_compute(batch):.2f}",
        f"{cost.optimal_tokens_per_s() / tp:,.0f}",
        f"{batch / limits.sequential_s / tp:,.0f}",
        f"{batch / limits.overlapped_s / tp:,.0f}",
        f"{limits.sequential_s / limits.overlapped_s:.2f}x",
        limits.bound,
    )
