"""Predictions of plans that nothing can time: the table, and what results keep of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from nanoflow_backend.graph.collectives import describe_forms
from nanoflow_search.emit.schedule_file import Planned
from nanoflow_search.profile.network import ASSUMED

COLUMNS = ("tokens", "workload", "plan", "all-reduces", "SMs", "predicted", "over sequential")


def predicted_facts(planned: Sequence[Planned]) -> dict[str, Any]:
    """Return the predictions of all plans, as results are kept, and what they assume."""
    return {"kind": "predicted, nothing timed", "assumed": ASSUMED, "predictions": predicted_rows(planned)}


def show_predictions(planned: Sequence[Planned]) -> None:
    """Print the table of all predictions."""
    table = Table(title="one layer as it is predicted, not timed")
    for column in COLUMNS:
        table.add_column(column, no_wrap=True, justify="left" if column in COLUMNS[1:5] else "right")
    for row in predicted_rows(planned):
        sms = ", ".join(f"{lane} {count}" for lane, count in row["partition"].items())
        table.add_row(
            *(str(row["tokens"]), row["workload"], row["plan"], row["all_reduces"], sms),
            *(f"{row['layer_us']:,.1f} us", f"{row['over_sequential']:.3f}x"),
        )
    Console(width=max(Console().width, 130)).print(table)


def predicted_rows(planned: Sequence[Planned]) -> list[dict[str, Any]]:
    """Return a row for each plan of each size on each workload."""
    rows = []
    for of_size in planned:
        us = {(p.plan, p.workload): p.layer_us for p in of_size.predictions}
        for plan in of_size.plans:
            for workload in of_size.case.request.workloads:
                layer_us = us[plan.name, workload]
                rows.append(
                    {
                        "tokens": of_size.case.tokens,
                        "workload": workload,
                        "plan": plan.name,
                        "all_reduces": describe_forms(plan.schedule.all_reduces),
                        "partition": plan.schedule.partition,
                        "layer_us": round(layer_us, 1),
                        "over_sequential": round(us["sequential", workload] / layer_us, 4),
                        "gap": plan.gap,
                    }
                )
    return rows
