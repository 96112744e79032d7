"""This module is the command line `nanoflow-search`, which finds the schedule of a model on a machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from nanoflow_search.options import InDtype, KvDtype, On, Quantised
from nanoflow_search.request import Effort, Phase, SearchRequest

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
DEFAULT = Effort()

ModelFolder = Annotated[Path, typer.Option(help="A folder with a Hugging Face config.json.")]
OfDtype = Annotated[InDtype, typer.Option(help="Of weights and activations, as in engine.json.")]
Quantisation = Annotated[Quantised | None, typer.Option(help="Of products, as in engine.json.")]
KvCacheDtype = Annotated[KvDtype, typer.Option(help="Of KV pages, as in engine.json.")]
MeasureOn = Annotated[On, typer.Option(help="synthetic: a law in place of a GPU, for development.")]


@app.callback(invoke_without_command=True)
def search(
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
    network: Annotated[
        list[Path] | None,
        typer.Option(help="A table of what collectives of --tp ranks take, in place of measuring them. Repeatable."),
    ] = None,
    dtype: OfDtype = InDtype.BFLOAT16,
    quantization: Quantisation = None,
    kv_cache_dtype: KvCacheDtype = KvDtype.AUTO,
    profile: Annotated[
        Path | None, typer.Option(help="A profile to use, or to measure; default: NAME.profile.json.")
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
    rounds: Annotated[int, typer.Option(min=2, help="Rounds of timing, A B B A each.")] = DEFAULT.rounds,
    turns: Annotated[int, typer.Option(min=1, help="Runs of the two stages for each number of parts.")] = DEFAULT.turns,
    time_limit_s: Annotated[float, typer.Option(min=0.1, help="Time limit of each program.")] = DEFAULT.time_limit_s,
    device: MeasureOn = On.AUTO,
) -> None:
    """Find the schedule of a model on a machine. The same command again goes on where it was cut."""
    if context.invoked_subcommand:
        if given := [name for name in context.params if _is_given(context, name)]:
            raise typer.BadParameter(f"stands before {context.invoked_subcommand}", param_hint=_option(given[0]))
        return
    if model is None or not workload or out is None:
        missing = "model" if model is None else "out" if workload else "workload"
        raise typer.BadParameter("expected a value", param_hint=_option(missing))
    effort = Effort(plans=plans, rounds=rounds, turns=turns, time_limit_s=time_limit_s, shared=shared)
    request = SearchRequest.of(model, tp, workload, **_precision(dtype, quantization, kv_cache_dtype))
    run_search(request, dense_batch_tokens or [], effort, device, profile, out, until, network or [])


def run_search(
    request: SearchRequest,
    sizes: list[int],
    effort: Effort,
    device: On,
    profile: Path | None,
    out: Path,
    until: Phase,
    network: Sequence[Path] = (),
) -> None:
    """Write the schedule file `out`, and beside it a picture of the plan at B_dense and a result; print the table.

    With tables of the `network` nothing is timed: the file holds what is predicted, and there is no picture.

    Raises:
        ValueError: something that was asked for is wrong or cannot be done here; the message names it.
    """
    import msgspec

    from nanoflow_backend.bench import result
    from nanoflow_backend.config.engine_config import RULES
    from nanoflow_backend.config.error import ConfigError
    from nanoflow_backend.config.network_table import NetworkTable
    from nanoflow_backend.config.rules import broken
    from nanoflow_backend.offline.output import check_output
    from nanoflow_search.checkpoint import Checkpoint
    from nanoflow_search.cost.batch_sizes import checked_sizes
    from nanoflow_search.emit.picture import draw_plan
    from nanoflow_search.emit.predictions import predicted_facts, show_predictions
    from nanoflow_search.emit.progress import ProgressDisplay
    from nanoflow_search.emit.tables import search_facts, show_trials
    from nanoflow_search.hardware.machine import find_machine
    from nanoflow_search.profile.network import check_tables
    from nanoflow_search.search import search

    if faults := broken({"--tp": RULES["tensor_parallel"]}, {"--tp": request.ranks}):
        raise ConfigError(faults[0])  # no engine would load the plans
    tables = [NetworkTable.load(table) for table in network]
    check_tables(tables, request.ranks)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out.parent}: {error.strerror}") from None
    check_output(out)
    checkpoint, path = Checkpoint(out.with_suffix(".search")), profile or out.with_suffix(".profile.json")
    machine = find_machine(device.value, request.ranks, bool(tables))
    with ProgressDisplay() as display:
        found = search(request, checked_sizes(sizes), effort, machine, path, checkpoint, display, until, tables)
    if found is None:
        print(f"{until} done; the same command without --until {until} goes on from {checkpoint.folder}")
        return
    file, best = found.file, found.best
    file.save(out)
    about: dict[str, Any] = {"model": request.name, "schedule": out.name}
    facts = search_facts(file, found.profile, display.phases_s)
    if best is None:
        about |= {"tensor_parallel": request.ranks, "network": [msgspec.to_builtins(table.header) for table in tables]}
        result.write({**about, **facts, **predicted_facts(found.planned)}, out.with_suffix(".result.json"))
        show_predictions(found.planned)
        print(f"{out}: predicted, and not timed; B_dense {file.header.dense_batch_tokens}")
        return
    out.with_suffix(".svg").write_text(draw_plan(best.case, best.winner.schedule))
    result.write({**about, **facts}, out.with_suffix(".result.json"))
    show_trials(file)
    print(f"{out}: B_dense {file.header.dense_batch_tokens}; nanoflow-search explain {out} says why")


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _precision(dtype: InDtype, quantization: Quantised | None, kv_cache_dtype: KvDtype) -> dict[str, str | None]:
    """Return the fields of engine.json that options stand for."""
    return {
        "dtype": dtype.value,
        "quantization": None if quantization is None else quantization.value,
        "kv_cache_dtype": kv_cache_dtype.value,
    }


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


@app.command()
def analyze(
    model: ModelFolder,
    workload: Annotated[list[str], typer.Option(help="Mean prompt/output tokens, e.g. 1024/512. Repeatable.")],
    device: Annotated[
        list[str] | None, typer.Option(help="Names of the device table; default: all. Repeatable.")
    ] = None,
    tp: Annotated[int, typer.Option(min=1, help="GPUs that share the model.")] = 1,
    dense_batch_tokens: Annotated[int | None, typer.Option(min=1, help="Default: what fills the memory.")] = None,
    quantization: Quantisation = None,
    kv_cache_dtype: KvCacheDtype = KvDtype.AUTO,
) -> None:
    """What bounds the model's throughput: the paper's cost model (section 3), with power as a fourth resource."""
    from nanoflow_search.emit.cost_table import show_cost_table

    precision = _precision(InDtype.BFLOAT16, quantization, kv_cache_dtype)
    show_cost_table(SearchRequest.of(model, tp, workload, **precision), device or [], dense_batch_tokens)


@app.command()
def explain(schedule: Annotated[Path, typer.Argument(help="A schedule file.")]) -> None:
    """Why a file's plans are what they are: predicted and measured, the next best, the bound that forbids more."""
    from nanoflow_backend.schedule.file import ScheduleFile
    from nanoflow_search.emit.tables import explain

    explain(ScheduleFile.load(schedule))


@app.command()
def time(
    model: ModelFolder,
    schedule: Annotated[list[str], typer.Option(help="A schedule file, or nano-batched-N. Repeatable.")],
    out: Annotated[Path, typer.Option(help="The JSON result; schedules that it holds are not timed again.")],
    workload: Annotated[str, typer.Option(help="Mean prompt/output tokens.")] = "512/1024",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the batch.")] = 2048,
    share: Annotated[
        float, typer.Option(min=0, max=1, help="Below 1: a batch of an engine that fills up, with this share running.")
    ] = 1.0,
    profile: Annotated[Path | None, typer.Option(help="A profile to predict with, before anything is timed.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Default: the model's.")] = None,
    rounds: Annotated[int, typer.Option(min=2, max=21, help="Rounds, A B B A each.")] = 3,
    seconds: Annotated[float, typer.Option(min=0.01, help="Seconds of each run that are measured.")] = 1.0,
    dtype: OfDtype = InDtype.BFLOAT16,
    quantization: Quantisation = None,
    kv_cache_dtype: KvCacheDtype = KvDtype.AUTO,
    device: MeasureOn = On.AUTO,
) -> None:
    """Time schedules beside sequential in a steady state, on the GPU that is here; with a profile, predict them first.

    With --share below 1, measurements show from which `least_decode_kv_tokens` on a plan wins.
    """
    from nanoflow_backend.bench import result
    from nanoflow_backend.schedule.presets import sequential
    from nanoflow_search.cost.workload import MeanWorkload, ramp_mix
    from nanoflow_search.emit.timed_schedules import named_schedules, time_schedules
    from nanoflow_search.hardware.machine import find_machine
    from nanoflow_search.predict.timing_model import TimingModel
    from nanoflow_search.profile.data import Profile

    request = SearchRequest.of(model, 1, [workload], **_precision(dtype, quantization, kv_cache_dtype))
    schedules = named_schedules(schedule, request.model, tokens)
    if (machine := find_machine(device.value, 1)) is None:
        raise ValueError("here is no GPU to time schedules on; --device synthetic has a law in its place")
    mix = ramp_mix(MeanWorkload.parse(workload), request.mix(workload, tokens, machine.name), share)
    num_layers = layers or request.model.num_layers
    facts = {
        "model": request.name,
        "workload": workload,
        "tokens": tokens,
        "share": share,
        "decode_kv_tokens": round(mix.decode_tokens * mix.decode_context),
        "layers": num_layers,
    }
    timing_model = TimingModel(Profile.load(profile), mix) if profile else None
    timer = machine.timer(request, mix, num_layers=num_layers, seconds=seconds)
    base = sequential(request.model.layer, tokens)
    time_schedules(
        schedules, base, facts, out, timer, rounds, lambda found: result.write(found, out), timing_model, num_layers
    )


@app.command()
def predict_run(
    model: ModelFolder,
    profile: Annotated[Path, typer.Option(help="A profile of the device to predict for.")],
    workload: Annotated[str, typer.Option(help="Tokens of each prompt/output.")] = "512/1024",
    trace: Annotated[
        Path | None, typer.Option(help="A CSV file of lengths, drawn as `nanoflow bench offline` does.")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="All are there at once.")] = 1200,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="A field of engine.json, e.g. --set schedule=plan.json. Repeatable."),
    ] = None,
    best: Annotated[bool, typer.Option(help="Each step under the best plan of two nano-batches for it.")] = False,
    out: Annotated[Path | None, typer.Option(help="Where the JSON result goes; default: standard output.")] = None,
) -> None:
    """What a whole run would take, from a profile and without a GPU: the engine's scheduler with predicted steps."""
    from nanoflow_backend.bench import result
    from nanoflow_backend.bench import workload as workloads
    from nanoflow_backend.commands.settings import parse
    from nanoflow_backend.config.engine_config import EngineConfig
    from nanoflow_backend.models.computed import read_computed
    from nanoflow_backend.runtime.cuda import bucket
    from nanoflow_search.cost.workload import MeanWorkload
    from nanoflow_search.emit.run_prediction import predict_run
    from nanoflow_search.profile.data import Profile

    settings = parse(setting or [])
    named = EngineConfig.resolve({"model": str(model), **settings}, relative_to=Path.cwd())
    (named, shape), taken = read_computed(named, "cuda"), Profile.load(profile)
    if trace:
        work = workloads.of_trace(trace, requests, named.max_model_tokens or shape.max_model_tokens)
    else:
        lengths = MeanWorkload.parse(workload)
        work = workloads.constant(int(lengths.prompt_tokens), int(lengths.output_tokens), requests)
    about = {
        "kind": "prediction from a profile, nothing measured",
        "device": taken.header.device,
        "profile": taken.hash(),
        "model": model.name,
        "best": best,
        "settings": result.without_folders(settings),
        "workload": work.name,
    }
    result.write({**about, **predict_run(named, shape, taken, work, bucket, best)}, out)


def main() -> None:
    """Run the command line; an error that names its cause is printed without a traceback."""
    try:
        app()
    except ValueError as error:  # ConfigError, ScheduleError, ProfileError and SearchError are
        sys.exit(f"nanoflow-search: {error}")


if __name__ == "__main__":
    main()
