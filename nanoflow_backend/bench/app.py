"""bench is the command line `nanoflow bench`. Each command imports what it needs when it runs: --help is instant."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

from nanoflow_backend.commands.options import (
    InputTokens,
    LengthsOfDataset,
    LengthsOfTrace,
    Model,
    OutputTokens,
    Requests,
    Result,
    Settings,
)

bench = typer.Typer(no_args_is_help=True, help="Measure the engine.")


@bench.command()
def offline(
    model: Model,
    output: Result = None,
    input_tokens: InputTokens = 128,
    output_tokens: OutputTokens = 128,
    requests: Requests = 64,
    trace: LengthsOfTrace = None,
    dataset: LengthsOfDataset = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(
            help="LENGTHS:REQUESTS instead, such as 1024/512:1500, trace.csv:1800 or lmsys-like:500. Repeatable: one "
            "after the other on one engine."
        ),
    ] = None,
    breakdown: Annotated[bool, typer.Option(help="Profile a few steps: the time of each operation. On a GPU.")] = False,
    breakdown_only: Annotated[
        bool, typer.Option(help="The same from a minute of the workload, without the whole run.")
    ] = False,
    emulate_tp: Annotated[
        int | None,
        typer.Option(help="One rank of so many alone, its collectives a clock's: a prediction; tokens mean nothing."),
    ] = None,
    network: Annotated[
        Path | None, typer.Option(help="Emulated: a JSON table of what collectives take, such as NCCL's.")
    ] = None,
    network_gb_per_s: Annotated[
        float | None, typer.Option(help="Emulated: collectives on 8 SMs at this bus rate instead.")
    ] = None,
    settings: Settings = None,
) -> None:
    """Throughput with all requests queued at once: constant lengths, those of a trace, or drawn ones."""
    from nanoflow_backend.bench.emulation import Emulation
    from nanoflow_backend.bench.offline import bench_offline
    from nanoflow_backend.bench.workload import asked_for

    bench_offline(
        model,
        output,
        workloads=asked_for(workload or [], trace, dataset, (input_tokens, output_tokens), requests),
        breakdown=breakdown,
        breakdown_only=breakdown_only,
        settings=settings or [],
        emulation=Emulation.asked_for(emulate_tp, network, network_gb_per_s),
    )


@bench.command()
def online(
    model: Model,
    output: Result = None,
    rate: Annotated[list[float] | None, typer.Option(help="Open loop: requests a second; repeatable.")] = None,
    duration: Annotated[float | None, typer.Option(help="Open loop: seconds of measured arrivals. [60]")] = None,
    warm_up: Annotated[float | None, typer.Option(help="Open loop: seconds of others before and after. [10]")] = None,
    input_tokens: InputTokens = 1024,
    output_tokens: Annotated[int, typer.Option(min=2)] = 128,
    trace: LengthsOfTrace = None,
    dataset: LengthsOfDataset = None,
    arrivals: Annotated[
        Literal["poisson", "trace"] | None,
        typer.Option(help="Open loop: drawn, or the trace's, stretched to each rate; without one, as they are."),
    ] = None,
    ttft_limit: Annotated[float | None, typer.Option(help="Goodput: ms to a request's first token.")] = None,
    itl_limit: Annotated[float | None, typer.Option(help="Goodput: ms between its tokens, the mean.")] = None,
    seed: Annotated[int | None, typer.Option(help="Open loop: of arrivals and prompts. [0]")] = None,
    url: Annotated[str | None, typer.Option(help="Open loop: a server's gRPC endpoint, host:port.")] = None,
    served_model: Annotated[str | None, typer.Option(help="Its model there. [nanoflow]")] = None,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Closed loop: measured for each level at least, one a client. [32]")
    ] = None,
    concurrency: Annotated[
        list[int] | None, typer.Option(min=1, help="Closed loop: requests in flight; repeatable. [1, 16, 64, 256]")
    ] = None,
    settings: Settings = None,
) -> None:
    """Latency: at a rate of arrivals (open loop), or with so many requests in flight (closed loop).

    With --rate or --arrivals trace, requests come when they are due, whatever has become of those before them.
    """
    from nanoflow_backend.bench.online.command import bench_online

    open_loop = {
        "duration": duration, "warm-up": warm_up, "trace": trace, "dataset": dataset, "arrivals": arrivals,
        "seed": seed, "ttft-limit": ttft_limit, "itl-limit": itl_limit, "url": url, "served-model": served_model,
    }  # fmt: skip
    closed_loop = {"requests": requests, "concurrency": concurrency}
    bench_online(
        model, output, rate or [], input_tokens, output_tokens, open_loop, closed_loop, settings=settings or []
    )


@bench.command()
def multi_round(
    model: Model,
    output: Result = None,
    dataset: Annotated[
        Literal["lmsys-like", "sharegpt-like"], typer.Option(help="Rounds and lengths drawn as in this dataset.")
    ] = "lmsys-like",
    conversations: Annotated[int, typer.Option(min=1, help="How many in all.")] = 64,
    active: Annotated[int, typer.Option(min=1, help="At a time: when one has ended, the next begins.")] = 16,
    think_s: Annotated[
        float, typer.Option(min=0, help="A user's mean time between an answer and the next turn.")
    ] = 0.0,
    scale: Annotated[float, typer.Option(help="Of all lengths, for models that are smaller than life.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of lengths, times and prompts.")] = 0,
    limit_s: Annotated[float, typer.Option(min=0, help="End then, with what was answered by then.")] = math.inf,
    step_cost: Annotated[
        str | None,
        typer.Option(
            help="What a step takes at least (ms), a token (us), and one of the KV cache that a decode reads (ns), as "
            "measured; 5.6,22.3,33.4 for Llama-3-8B on an H200: adds the rounds/s that no engine can beat."
        ),
    ] = None,
    settings: Settings = None,
) -> None:
    """Conversations that come back: rounds a second, and how many prompt tokens each tier of the KV cache saved."""
    from nanoflow_backend.bench.multi_round.command import bench_multi_round

    bench_multi_round(
        model,
        output,
        dataset=dataset,
        conversations=conversations,
        active=active,
        think_s=think_s,
        scale=scale,
        seed=seed,
        limit_s=limit_s,
        step_cost=step_cost,
        settings=settings or [],
    )


@bench.command()
def plot(
    runs: Annotated[
        list[Path],
        typer.Argument(help="A result of `nanoflow bench offline`, or some of `nanoflow bench online --rate`."),
    ],
    output: Annotated[Path, typer.Option(help="Where the picture goes: .svg, .png or .pdf.")],
) -> None:
    """Draw a result. Needs the extra `plot`.

    Of an offline run: its use of compute, memory bandwidth and power over time. Of open loops: latencies over rates.
    """
    from nanoflow_backend.bench.plot import bench_plot

    bench_plot(runs, output)
