"""This module is the command line `nanoflow`. Each command imports what it needs when it runs: --help is instant."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from nanoflow_backend.bench.app import bench
from nanoflow_backend.commands.options import (
    InputTokens,
    LengthsOfDataset,
    LengthsOfTrace,
    Model,
    OutputTokens,
    Requests,
    Settings,
)

COULD_NOT_RUN = 2  # the exit status, as for an option that does not exist

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(bench, name="bench")

Repository = Annotated[Path, typer.Option(help="The folder that holds nanoflow/config.pbtxt.")]
HttpPort = Annotated[int, typer.Option(help="0: any free port.")]
GrpcPort = Annotated[int, typer.Option(help="0: any free port.")]
MetricsPort = Annotated[int, typer.Option(help="0: any free port.")]


def show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"nanoflow {version('nanoflow-triton')}")
        except PackageNotFoundError:  # a checkout on the path
            print("nanoflow, not installed: no version")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """NanoFlow for Triton Inference Server."""


@app.command()
def serve(
    model_repository: Repository = Path("model_repository"),
    http_port: HttpPort = 8000,
    grpc_port: GrpcPort = 8001,
    metrics_port: MetricsPort = 8002,
    log: Annotated[Path | None, typer.Option(help="Where the server's log goes on; warnings are shown anyway.")] = None,
    log_format: Annotated[
        Literal["text", "json"] | None, typer.Option(help="Of the model's own lines in it, the server's stay.")
    ] = None,
) -> None:
    """Run the real Triton Inference Server that pip brings, on loopback, until Ctrl-C."""
    from nanoflow_backend.commands.serve import serve

    serve(
        model_repository,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        log=log,
        log_format=log_format,
    )


@app.command()
def demo(
    model_repository: Repository = Path("model_repository"),
    http_port: HttpPort = 8000,
    grpc_port: GrpcPort = 8001,
    metrics_port: MetricsPort = 8002,
    prompt: Annotated[str, typer.Option(help="What the model continues.")] = "Write a string",
) -> None:
    """Start the server, stream one completion over gRPC and one over HTTP, and stop it."""
    from nanoflow_backend.commands.demo import demo

    demo(model_repository, prompt, http_port=http_port, grpc_port=grpc_port, metrics_port=metrics_port)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: Annotated[list[str] | None, typer.Option(help="A stop string. Repeatable.")] = None,
    settings: Settings = None,
) -> None:
    """Continue one prompt and print the text as it comes."""
    from nanoflow_backend.commands.generate import generate

    fields = {"max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    generate(model, prompt, {**fields, "stop": stop or []}, settings or [])


@app.command()
def batch(
    model: Model,
    input: Annotated[Path, typer.Option(help='JSON lines: {"prompt" or "prompt_token_ids", "max_tokens", ..., "id"}.')],
    output: Annotated[Path, typer.Option(help="JSON lines in the order of the input. One that exists is continued.")],
    cluster: Annotated[
        str | None,
        typer.Option(help="Of Ray: auto (this machine is a node), HOST:PORT of its head, or ray://HOST from anywhere."),
    ] = None,
    replicas: Annotated[int | None, typer.Option(min=1, help="Engines on the cluster. [1]")] = None,
    settings: Settings = None,
) -> None:
    """Complete a file of prompts. After a kill, run it again to go on.

    A bad line becomes an error line of the output. Exit status: 0 all lines are done; 1 some are errors; 2 the run
    could not begin or not go on.
    """
    from nanoflow_backend.commands.batch import batch

    raise typer.Exit(batch(model, input, output, settings or [], cluster, replicas))


@app.command()
def rank(
    model: Model,
    secret_file: Annotated[Path, typer.Option(help="What the hosts prove to have: openssl rand -hex 32.")],
    leader: Annotated[
        str | None, typer.Option(help="HOST:PORT of the engine. [LWS_LEADER_ADDRESS, or MASTER_ADDR:MASTER_PORT]")
    ] = None,
    node_rank: Annotated[
        int | None, typer.Option(help="Which host this is, from 1. [LWS_WORKER_INDEX, or NODE_RANK]")
    ] = None,
    join_timeout: Annotated[float, typer.Option(min=1, help="Seconds without an engine, then it ends.")] = 600.0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A field of engine.json that the engine must have so. Repeatable.")
    ] = None,
) -> None:
    """Run this host's ranks of an engine on another host, whose engine.json has `hosts`; and again when it restarts."""
    from nanoflow_backend.commands.rank import rank

    raise typer.Exit(rank(model, leader, secret_file, node_rank, join_timeout, settings or []))


@app.command()
def trace(
    model: Model,
    output: Annotated[Path, typer.Option(help="Where the trace goes: JSON for ui.perfetto.dev or chrome://tracing.")],
    steps: Annotated[int, typer.Option(min=1, help="How many.")] = 20,
    input_tokens: InputTokens = 128,
    output_tokens: OutputTokens = 128,
    requests: Requests = 64,
    trace: LengthsOfTrace = None,
    dataset: LengthsOfDataset = None,
    begin: Annotated[
        Literal["start", "decodes"], typer.Option(help="With the first step, or with the first of decodes alone.")
    ] = "start",
    skip_steps: Annotated[int, typer.Option(min=0, help="Then so many are left out.")] = 0,
    settings: Settings = None,
) -> None:
    """A few steps of a workload whose requests all come at once, launch by launch: lanes, waits, and the host's work.

    The steps before them, as many, are timed untraced, to say what tracing costs.
    """
    from nanoflow_backend.bench.step_trace.command import bench_trace
    from nanoflow_backend.bench.workload import asked_for

    (spec,) = asked_for([], trace, dataset, (input_tokens, output_tokens), requests)
    bench_trace(model, output, spec=spec, steps=steps, begin=begin, skip_steps=skip_steps, settings=settings or [])


def main() -> None:
    """Errors that name their cause need no traceback."""
    from nanoflow_backend.cluster.error import ClusterError
    from nanoflow_backend.config.error import ConfigError
    from nanoflow_backend.embedded.server import ServerError
    from nanoflow_backend.hosts.rank_error import RankError
    from nanoflow_backend.process import logs
    from nanoflow_backend.process.child import THREADS_SLEEP
    from nanoflow_backend.request.internal_error import InternalError
    from nanoflow_backend.request.sampling_params import InvalidRequest
    from nanoflow_backend.schedule.plan import ScheduleError

    for name, value in THREADS_SLEEP.items():
        os.environ.setdefault(name, value)  # before torch is imported
    try:
        logs.configure(level="warning")
        app()
    except (ClusterError, ConfigError, InternalError, InvalidRequest, RankError, ScheduleError, ServerError) as error:
        print(f"nanoflow: {error}", file=sys.stderr)
        sys.exit(COULD_NOT_RUN)


if __name__ == "__main__":
    main()
