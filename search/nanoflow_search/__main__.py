"""nanoflow-search: find the schedule of a model on a machine."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from nanoflow_search.request import Effort, Phase, Setting

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
DEFAULT = Effort()


class InDtype(StrEnum):
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class On(StrEnum):
    AUTO = "auto"
    SYNTHETIC = "synthetic"


@app.callback(invoke_without_command=True)
def find(
    context: typer.Context,
    model: Annotated[Path | None, typer.Option(help="A folder with a Hugging Face config.json.")] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(help="Mean prompt/output tokens, e.g. 1024/512. Repeatable: plans that are good for all of them."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The schedule file. What is done lies beside it, in NAME.search.")
    ] = None,
    tp: Annotated[int, typer.Option(min=1, help="GPUs that share the model.")] = 1,
    dtype: Annotated[
        InDtype, typer.Option(help="Of weights, activations and KV pages, as in engine.json.")
    ] = InDtype.BFLOAT16,
    profile: Annotated[
        Path | None, typer.Option(help="Taken before, or to be taken; default: NAME.profile.json.")
    ] = None,
    dense_batch_tokens: Annotated[
        list[int] | None,
        typer.Option(
            help="Sizes of a batch to plan for, multiples of 128. Repeatable; default: what fills the memory."
        ),
    ] = None,
    until: Annotated[
        Phase, typer.Option(help="Stop after this phase. The profile and the timing need the GPU, plans a solver.")
    ] = Phase.TIMING,
    plans: Annotated[int, typer.Option(min=1, help="Plans of each size that are timed.")] = DEFAULT.plans,
    shared: Annotated[
        bool, typer.Option(help="Also profile lanes that share SMs, and plan for them.")
    ] = DEFAULT.shared,
    rounds: Annotated[int, typer.Option(min=2, help="Of timing, A B B A each.")] = DEFAULT.rounds,
    turns: Annotated[int, typer.Option(min=1, help="Of the two programs, for each number of parts.")] = DEFAULT.turns,
    time_limit_s: Annotated[float, typer.Option(min=0.1, help="Of each program.")] = DEFAULT.time_limit_s,
    device: Annotated[On, typer.Option(help="synthetic: a law in place of a GPU, for development.")] = On.AUTO,
) -> None:
    """Find the schedule of a model on a machine. The same command again goes on where it was cut."""
    if context.invoked_subcommand:
        if given := [name for name in context.params if _is_given(context, name)]:
            raise typer.BadParameter(f"stands before {context.invoked_subcommand}", param_hint=_option(given[0]))
        return
    if model is None or not workload or out is None:
        missing = "model" if model is None else "out" if workload else "workload"
        raise typer.BadParameter("expected a value", param_hint=_option(missing))
    from nanoflow_search.command import find_schedules

    effort = Effort(plans=plans, rounds=rounds, turns=turns, time_limit_s=time_limit_s, shared=shared)
    setting = Setting.of(model, tp, workload, dtype.value)
    find_schedules(setting, dense_batch_tokens or [], effort, device.value, profile, out, until)


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


@app.command()
def analyze(
    model: Annotated[Path, typer.Option(help="A folder with a Hugging Face config.json.")],
    workload: Annotated[list[str], typer.Option(help="Mean prompt/output tokens, e.g. 1024/512. Repeatable.")],
    device: Annotated[
        list[str] | None, typer.Option(help="Names of the device table; default: all. Repeatable.")
    ] = None,
    tp: Annotated[int, typer.Option(min=1, help="GPUs that share the model.")] = 1,
    dense_batch_tokens: Annotated[int | None, typer.Option(min=1, help="Default: what fills the memory.")] = None,
) -> None:
    """What bounds the model's throughput: the paper's cost model (section 3), with power as a fourth resource."""
    from nanoflow_search.emit.analyze import analyze

    analyze(model, device or [], tp, workload, dense_batch_tokens)


@app.command()
def explain(schedule: Annotated[Path, typer.Argument(help="A schedule file.")]) -> None:
    """Why a file's plans are what they are: predicted and measured, the next best, the bound that forbids more."""
    from nanoflow_backend.schedule.file import ScheduleFile
    from nanoflow_search.emit.tables import explain

    explain(ScheduleFile.load(schedule))


def main() -> None:
    """Errors that name their cause need no traceback."""
    try:
        app()
    except ValueError as error:  # ConfigError, ScheduleError, ProfileError and SearchError are
        sys.exit(f"nanoflow-search: {error}")


if __name__ == "__main__":
    main()
