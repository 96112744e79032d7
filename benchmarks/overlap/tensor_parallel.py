"""Plans for Llama-3-70B on 2, 4 and 8 H200s are predicted before any machine has run them.

    python -m benchmarks tensor-parallel --output benchmarks/results/predicted_tensor_parallel_llama3_70b.json

A rank's shard takes the times of Llama-3-8B's profile for as much work (`shard_profile.py`): no shard was profiled. The
sequential arm has NCCL's collectives as they were measured on eight H200s, and on two and four at the same rate a rank;
the plans have copies on 8 SMs at an assumed rate. Nothing here is a measurement.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from msgspec.structs import replace
from nanoflow_search.checkpoint import Run
from nanoflow_search.emit.predictions import predicted_rows
from nanoflow_search.emit.schedule_file import Planned, make_predicted_file
from nanoflow_search.plan.batch_case import BatchCase
from nanoflow_search.plan.candidates import find_candidates, predictions_of
from nanoflow_search.predict.predict import predict
from nanoflow_search.profile.data import Profile
from nanoflow_search.profile.network import ASSUMED, check_tables, with_network
from nanoflow_search.request import Effort, SearchRequest

from benchmarks.overlap.shard_profile import shard_profile
from nanoflow_backend.bench import result
from nanoflow_backend.config.network_table import NetworkHeader, NetworkTable
from nanoflow_backend.graph.collectives import describe_forms
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.offline.output import check_output
from nanoflow_backend.schedule.plan import Launch, Schedule
from nanoflow_backend.schedule.presets import sequential

BENCHMARKS = Path(__file__).parents[1]
SCHEDULES, NETWORKS, MODELS = (BENCHMARKS / name for name in ("schedules", "networks", "models"))
COPY_SMS = 8
RATES = {8: (150.0, 250.0, 350.0)}  # GB/s of the copies, by ranks
MIDDLE_RATE = 250.0  # of other numbers of ranks, and of the schedule files
SIZES = (2048, 4096)
MEASURED_US = {2048: 1015.0, 4096: 1897.0}  # on eight H200s: products and NCCL's collectives, one after the other
NORMS = ("add_rms_norm", "rope_append", "attention")  # what those did not have


def main(
    output: Annotated[Path, typer.Option(help="The JSON result.")],
    tp: Annotated[list[int] | None, typer.Option(help="Ranks; default: 2, 4 and 8. Repeatable.")] = None,
    profile: Annotated[Path, typer.Option(help="Of Llama-3-8B, whose times a shard takes.")] = SCHEDULES
    / "profile_llama3_8b_h200.json",
    workload: Annotated[str, typer.Option(help="Mean prompt/output tokens.")] = "1024/512",
    turns: Annotated[int, typer.Option(min=0, help="Runs of the two stages for each number of parts.")] = 1,
    time_limit_s: Annotated[float, typer.Option(help="Time limit of each program.")] = 20.0,
    schedules: Annotated[Path | None, typer.Option(help="A folder for the schedule files of the middle rate.")] = None,
) -> None:
    """Predict sequential and the best plans for each number of ranks, size of a batch and rate of the copies."""
    ranks_asked = tp or [2, 4, 8]
    for file in (output, *([_schedule_file(schedules, ranks) for ranks in ranks_asked] if schedules else ())):
        check_output(file)
    of_8b, taken = build(read_model_config(MODELS / "llama-3-8b")).layer, Profile.load(profile)
    effort = Effort(plans=3, turns=turns, time_limit_s=time_limit_s)
    rows: list[dict[str, Any]] = []
    checks: list[dict[str, Any]] = []
    facts: dict[str, Any] = {
        "kind": "predicted, nothing timed",
        "model": "llama-3-70b",
        "gpu": taken.header.device,
        "profile": {"of": "llama-3-8b, put together for a shard by work", "hash": taken.hash()},
        "network": [nccl_table(ranks).header.source for ranks in ranks_asked],
        "assumed": ASSUMED,
        "workload": workload,
    }
    for ranks in ranks_asked:
        request = SearchRequest.of(MODELS / "llama-3-70b", ranks, [workload])
        shard = shard_profile(taken, of_8b, request)
        checks += check(request, shard)
        for rate in RATES.get(ranks, (MIDDLE_RATE,)):
            planned = []
            for tokens in SIZES:
                began = time.perf_counter()
                case = case_at(request, shard, tokens, rate)
                plans = find_candidates(case, effort, Run(say=print))
                planned.append(Planned(case, plans, predictions_of(case, plans), case.bounds_us()))
                about = {"tensor_parallel": ranks, "gb_per_s": rate, "seconds": round(time.perf_counter() - began, 1)}
                rows += [about | row for row in (*predicted_rows(planned[-1:]), *in_forms_alone(case))]
                result.write({**facts, "checks": checks, "rows": rows}, output)
            if schedules and rate == MIDDLE_RATE:
                make_predicted_file(planned).save(_schedule_file(schedules, ranks))


def _schedule_file(folder: Path, ranks: int) -> Path:
    return folder / f"llama3_70b_tp{ranks}_h200_predicted.json"


def in_forms_alone(case: BatchCase) -> list[dict[str, Any]]:
    """Return what the forms of all-reduces gain by themselves: one operation after the other, on NCCL's SMs."""
    (workload,), layers = case.request.workloads, case.request.model.num_layers
    us = {
        describe_forms(forms): predict(
            sequential(case.graph(forms), case.tokens), case.timing_model(workload), layers
        ).layer_us
        for forms in case.forms
    }
    return [
        {
            "tokens": case.tokens,
            "workload": workload,
            "plan": "sequential",
            "all_reduces": name,
            "partition": {},
            "layer_us": round(layer_us, 1),
            "over_sequential": round(us["whole"] / layer_us, 4),
        }
        for name, layer_us in us.items()
        if name != "whole"
    ]


def case_at(request: SearchRequest, shard: Profile, tokens: int, rate: float) -> BatchCase:
    """Return batches of `tokens` on a network with NCCL, and with copies at `rate` GB/s."""
    tables = [nccl_table(request.ranks), copy_table(request.ranks, rate)]
    check_tables(tables, request.ranks)
    mix = request.mix(request.workloads[0], tokens, shard.header.device)
    return BatchCase(request, with_network(shard, request.operations, tables, mix, [tokens]), tokens)


def nccl_table(ranks: int) -> NetworkTable:
    """Return NCCL's times: measured on eight, on fewer at the same rate a rank."""
    measured = NetworkTable.load(NETWORKS / "nccl_h200_tp8.json")
    if ranks == measured.header.ranks:
        return measured
    scale = ((ranks - 1) / ranks) / ((measured.header.ranks - 1) / measured.header.ranks)
    source = f"Derived for {ranks} ranks at the rate of eight. {measured.header.source}"
    return NetworkTable(
        header=replace(measured.header, ranks=ranks, source=source),
        times=tuple(replace(row, us=row.us * scale, power_w=None) for row in measured.times),
    )


def copy_table(ranks: int, rate: float) -> NetworkTable:
    """Return copies on COPY_SMS SMs: each rank sends at `rate` GB/s."""
    measured = NetworkTable.load(NETWORKS / "nccl_h200_tp8.json").header
    header = NetworkHeader(
        name=f"copies at {rate:g} GB/s",
        device=measured.device,
        ranks=ranks,
        source="assumed",
        link_pj_per_byte=measured.link_pj_per_byte,
    )
    return NetworkTable.at_rate(header, COPY_SMS, rate)


def check(request: SearchRequest, shard: Profile) -> list[dict[str, Any]]:
    """Return products and NCCL in sequence as predicted, beside what eight H200s took; nothing for other ranks."""
    if request.ranks != 8:
        return []
    rows = []
    for tokens, measured_us in MEASURED_US.items():
        case = case_at(request, shard, tokens, MIDDLE_RATE)
        launches = tuple(
            Launch(operation=op.name, start=0, stop=tokens, lane="compute")
            for op in case.graph().operations
            if op.kernel not in NORMS
        )
        plan = Schedule(tokens=tokens, launches=launches)
        predicted = predict(plan, case.timing_model(request.workloads[0]), request.model.num_layers)
        rows.append(
            {
                "tokens": tokens,
                "products_and_nccl_predicted_us": round(predicted.layer_us, 1),
                "measured_us": measured_us,
                "error": round(predicted.layer_us / measured_us - 1, 4),
            }
        )
    return rows
