"""Tensor parallelism is predicted on one GPU: rank 0's shard alone, with a clock in place of the other ranks.

A steady batch runs sequential, with the collectives of a table such as NCCL's; in halves one after the other
("nano-batch only"), with the same; and overlapped, with collectives on 8 SMs at each of some assumed rates. No result
is of several GPUs: all are labelled `emulated`, and say what the emulation lacks.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from nanoflow_search.cost.batch_sizes import checked_sizes
from nanoflow_search.cost.workload import MeanWorkload, Mix
from nanoflow_search.hardware.plan_timer import PlanTimer

from benchmarks.overlap.emulated_rank import EmulatedRank
from benchmarks.resumable import Cell, Record, fill
from nanoflow_backend.bench.emulation import Emulation
from nanoflow_backend.bench.step_trace.launch_times import RecordedLaunches
from nanoflow_backend.config.network_table import NetworkTable
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.runtime.device import find_device
from nanoflow_backend.schedule.file import ScheduleFile

TOKENS = (2048, 4096)
RATES = (150.0, 250.0, 350.0)  # GB/s that a rank sends
HOUSE = Path(__file__).parents[1]
WARM_S = 0.35  # before a run is measured: the GPU is hot from the one before, and only its clock must follow


def main(
    output: Annotated[Path, typer.Option(help="The JSON result, written after every cell; goes on where it was cut.")],
    model: Annotated[Path, typer.Option(help="A folder with a Hugging Face config.json.")] = HOUSE
    / "models/llama-3-70b",
    network: Annotated[
        Path, typer.Option(help="What collectives take where nothing overlaps; its ranks are those that are emulated.")
    ] = HOUSE / "networks/nccl_h200_tp8.json",
    schedule: Annotated[
        list[Path] | None,
        typer.Option(help="A file of the search, for the overlapped arm; repeatable. Default: halves."),
    ] = None,
    workload: Annotated[str, typer.Option(help="PROMPT/OUTPUT.")] = "1024/512",
    tokens: Annotated[list[int] | None, typer.Option(help=f"Of a batch; repeatable, default: {TOKENS}.")] = None,
    rate: Annotated[
        list[float] | None,
        typer.Option(min=1, help=f"GB/s that overlapped collectives take; repeatable, default: {RATES}."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, max=21, help="Of A B C D E E D C B A.")] = 5,
    layers: Annotated[int | None, typer.Option(help="Default: the model's; with fewer, ramps weigh more.")] = None,
    duration_s: Annotated[float, typer.Option(help="That is measured, a run.")] = 0.8,
) -> None:
    """One rank of TP 8 alone, EMULATED: what overlapping its collectives would gain over running in sequence."""
    table = NetworkTable.load(network)
    emulation = Emulation.asked_for(table.header.ranks, network, None)
    assert emulation is not None
    config, device, rates = read_model_config(model), find_device("cuda"), tuple(rate or RATES)
    num_layers = layers or config.num_layers

    def timer_of(mix: Mix, network: NetworkTable) -> PlanTimer:
        return PlanTimer.here(config, mix, network=network, num_layers=num_layers, seconds=duration_s, warm_s=WARM_S)

    watcher_of = partial(RecordedLaunches, cuda_graphs=True)
    bench = EmulatedRank(config, table, rates, device.name, device.sms, num_layers, timer_of, watcher_of)
    facts = {
        "benchmark": "emulated tensor parallelism",
        **emulation.facts(),
        "model": model.name,
        "device": device.name,
        "workload": workload,
        "schedules": [path.name for path in schedule or ()],
        "rates_gb_per_s": [*rates],
        "layers": num_layers,
        "seconds": duration_s,
        "rounds": rounds,
    }
    files = {path.name: ScheduleFile.load(path) for path in schedule or ()}
    bench.check(files)
    fill(
        Record(output, facts),
        [{"tokens": size} for size in checked_sizes(tokens or TOKENS)],
        lambda key, known: known or bench.compare(MeanWorkload.parse(workload), key["tokens"], files, rounds),
        summarise_arms,
    )


def summarise_arms(cell: Cell) -> str:
    """A line for the terminal: the gain of each arm, with the range that links leave."""
    gains = []
    for name, arm in cell["arms"].items():
        low, high = sorted(arm["over_sequential_with_links"])
        exposed = f"{arm['exposed_us']:.0f} of {arm['network_us']:.0f} us exposed, {arm['asked_us']:.0f} asked for"
        gains.append(f"{name} {arm['over_sequential'][0]:.3f}x ({low:.3f} to {high:.3f} with links; {exposed})")
    return f"EMULATED {', '.join(gains)}"
