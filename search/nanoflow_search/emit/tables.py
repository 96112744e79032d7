"""The tables of a search show what was predicted, what was measured, and why the plans are what they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from nanoflow_backend.schedule.file import ScheduleFile, Trial
from nanoflow_backend.schedule.plan import Schedule
from nanoflow_search.profile.data import Profile, held_out
from nanoflow_search.profile.load import ProfileError

NEAR_LEAST = 0.99  # a bound within 1 % of the highest one counts as the reason
KNOWN_S = 0.1  # a phase that took less only read its files
TRIAL_COLUMNS = (
    *("B_dense", "workload", "plan", "predicted", "measured"),
    *("error", "gain", "95 %", "W", "MHz", "mJ/token", ""),
)


def show_trials(file: ScheduleFile) -> None:
    """Print the table of all trials."""
    table = Table(title="one layer: predicted before it was timed, measured, and faster than sequential by")
    for column in TRIAL_COLUMNS:
        table.add_column(column, no_wrap=True, justify="left" if column in ("workload", "plan", "") else "right")
    size = None
    for trial in file.trials:
        if size not in (None, trial.dense_batch_tokens):
            table.add_section()
        size = trial.dense_batch_tokens
        table.add_row(*_row(trial), style="bold" if trial.chosen else None)
    console = Console(width=max(Console().width, 130))  # a pipe has no width of its own
    console.print(table)


def search_facts(file: ScheduleFile, profile: Profile, phases_s: Mapping[str, float]) -> dict[str, Any]:
    """Return what a search found and how long it took, as results are kept.

    `phases_s` has the seconds of each phase in the command's last run; phases that were done before are left out.
    """
    facts: dict[str, Any] = {"hash": profile.hash(), "points": len(profile.points), "pairs": len(profile.pairs)}
    try:
        errors = held_out(profile)
        facts |= {"held_out_error_median": round(errors.median, 4), "held_out_error_worst": round(errors.worst, 4)}
    except ProfileError:  # a small model is measured at too few amounts
        pass
    return {
        "device": profile.header.device,
        "profile": facts,
        "phases_s": {phase: round(seconds, 1) for phase, seconds in phases_s.items() if seconds >= KNOWN_S},
        "trials": msgspec.to_builtins(file.trials),
        "bounds_us": file.bounds_us,
    }


def explain(file: ScheduleFile) -> None:
    """Print the header, the table, why each size's plan was chosen, and what bounds the time."""
    header = file.header
    console = Console(width=max(Console().width, 130))
    console.print(
        f"{header.device}, {header.device_sms} SMs, TP {header.tensor_parallel}, layer {header.model_fingerprint}, "
        f"{header.precision}; "
        f"for {', '.join(header.workloads)} tokens in/out; profile {header.profile_hash}; "
        f"solver {header.solver}, gap {header.gap}",
        highlight=False,
        soft_wrap=True,
    )
    if not file.trials:
        if header.predicted_us is None:
            console.print("Nothing is told in this file of how its plans were found.")
            return
        console.print(f"Predicted, and not timed: {header.predicted_us:,.1f} us a layer at B_dense.", highlight=False)
        for line in _ranges(file):
            console.print(line, highlight=False, soft_wrap=True)
        return
    show_trials(file)
    for line in (*_ranges(file), *_choices(file), *_bounds(file)):
        console.print(line, highlight=False, soft_wrap=True)


def _row(trial: Trial) -> tuple[str, ...]:
    sequential = trial.plan == "sequential"
    return (
        str(trial.dense_batch_tokens),
        trial.workload,
        trial.plan,
        f"{trial.predicted_us:,.1f} us",
        f"{trial.measured_us:,.1f} us",
        f"{100 * (trial.predicted_us / trial.measured_us - 1):+.1f} %",
        "" if sequential else f"{trial.gain:.3f}x",
        "" if sequential else f"{trial.gain_low:.3f}..{trial.gain_high:.3f}",
        f"{trial.power_w:.0f}",
        f"{trial.clock_mhz:.0f}",
        f"{trial.token_mj:.2f}",
        "chosen" if trial.chosen else "",
    )


def _ranges(file: ScheduleFile) -> Iterator[str]:
    above, which = 0, "Batches"
    for plan in file.plans:
        least = plan.least_decode_kv_tokens
        reading = f" whose decodes read {least:,} or more tokens of the KV cache" if least else ""
        yield f"{which} of {above + 1}..{plan.tokens} tokens{reading}: {_shape(plan)}."
        above, which = (above, "Others") if least else (plan.tokens, "Batches")


def _shape(plan: Schedule) -> str:
    parts = {x.operation: sum(y.operation == x.operation for y in plan.launches) for x in plan.launches}
    if set(parts.values()) == {1} and len(plan.lanes) == 1:
        return "sequential"
    by_count: dict[int, list[str]] = {}
    for operation, count in parts.items():
        by_count.setdefault(count, []).append(operation)
    cut = "; ".join(f"{', '.join(names)} in {count}" for count, names in sorted(by_count.items(), reverse=True))
    return f"{len(plan.launches)} launches in the lanes {', '.join(plan.lanes)} ({cut})"


def _choices(file: ScheduleFile) -> Iterator[str]:
    for tokens in dict.fromkeys(trial.dense_batch_tokens for trial in file.trials):
        for workload in file.header.workloads:
            trials = [t for t in file.trials if (t.dense_batch_tokens, t.workload) == (tokens, workload)]
            chosen = next(t for t in trials if t.chosen)
            others = [t for t in trials if not t.chosen and t.plan != "sequential"]
            where = f"{tokens} tokens, {workload}: "
            if chosen.plan == "sequential":
                yield where + "sequential, for no plan is faster for certain" + _next_best(others, "the best was")
            else:
                yield (
                    f"{where}{chosen.plan} is {chosen.gain:.3f}x sequential (95 %: {chosen.gain_low:.3f}.."
                    f"{chosen.gain_high:.3f}); predicted {chosen.predicted_us:,.1f} us, measured "
                    f"{chosen.measured_us:,.1f}" + _next_best(others, "the next best was")
                )


def _next_best(others: list[Trial], words: str) -> str:
    if not others:
        return "."
    best = max(others, key=lambda trial: trial.gain)
    return f"; {words} {best.plan}, {best.gain:.3f}x ({best.gain_low:.3f}..{best.gain_high:.3f})."


def _bounds(file: ScheduleFile) -> Iterator[str]:
    """Yield the line that says which bound holds at B_dense, on the first workload."""
    tokens, workload = file.header.dense_batch_tokens, file.header.workloads[0]
    at_best = [t for t in file.trials if (t.dense_batch_tokens, t.workload) == (tokens, workload)]
    sequential = next(t for t in at_best if t.plan == "sequential")
    chosen = next(t for t in at_best if t.chosen)
    if not file.bounds_us:
        return
    least_us = max(file.bounds_us.values())
    name = next(name for name, us in file.bounds_us.items() if us > NEAR_LEAST * least_us)
    listed = ", ".join(f"{key} {us:,.1f}" for key, us in sorted(file.bounds_us.items(), key=lambda item: -item[1]))
    yield (
        f"By the profile, no plan's layer of {tokens} tokens, {workload}, is shorter than {least_us:,.1f} us, "
        f"at most {sequential.predicted_us / least_us:.3f}x sequential: the bound is {name} (us: {listed}). "
        f"Chosen: {chosen.measured_us:,.1f} us measured."
    )
