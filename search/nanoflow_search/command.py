"""find_schedules: the search as a command: its files, its progress, its tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from nanoflow_backend.bench import result
from nanoflow_search.checkpoint import State
from nanoflow_search.cost.batch_sizes import checked
from nanoflow_search.emit.progress import Display
from nanoflow_search.emit.tables import account, show
from nanoflow_search.hardware.machine import find_machine
from nanoflow_search.profile.data import Profile
from nanoflow_search.request import Effort, Phase, Setting
from nanoflow_search.search import search


def find_schedules(
    setting: Setting,
    sizes: Sequence[int],
    effort: Effort,
    on: Literal["auto", "synthetic"],
    profile: Path | None,
    out: Path,
    until: Phase,
) -> None:
    """Write `out` and, beside it, a picture of the plan at B_dense and the account of the search; print the table.

    Raises:
        ValueError: something is wrong with what was asked for, or cannot be done here; it is named.
    """
    state = State(out.with_suffix(".search"))
    machine = find_machine(on, setting.ranks)
    with Display() as display:
        path = profile or out.with_suffix(".profile.json")
        found = search(setting, checked(sizes), effort, machine, path, state, display, until)
    if found is None:
        print(f"{until} done; the same command without --until {until} goes on from {state.folder}")
        return
    file, plan = found
    file.save(out)
    out.with_suffix(".svg").write_text(plan.picture)
    told = account(file, Profile.load(path), display.phases_s)
    result.write({"model": setting.name, "schedule": out.name, **told}, out.with_suffix(".result.json"))
    show(file)
    print(f"{out}: B_dense {file.header.dense_batch_tokens}; nanoflow-search explain {out} says why")
