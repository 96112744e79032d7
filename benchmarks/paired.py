"""Plans beside sequential, as results show them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanoflow_search.emit.trials import Timer, Trial, time_round
from nanoflow_search.predict.predict import Timing

from nanoflow_backend.schedule.plan import Schedule


def compared(
    timer: Timer, sequential: Schedule, plans: Mapping[str, Schedule], rounds: int
) -> dict[str, dict[str, Any]]:
    """`over_sequential`: how much faster, the geometric mean over rounds and its 95 % interval."""
    taken = [time_round(timer, sequential, list(plans.values())) for _ in range(rounds)]
    trials = {name: Trial.of(of_plan) for name, of_plan in zip(plans, zip(*taken, strict=True), strict=True)}
    return {
        name: {
            "measured": described(trial.timing),
            "sequential": described(trial.sequential),
            "over_sequential": [round(value, 4) for value in trial.gain],
            "rounds": rounds,
        }
        for name, trial in trials.items()
    }


def described(timing: Timing) -> dict[str, float]:
    return {
        "layer_us": round(timing.layer_us, 2),
        "sm_clock_mhz": round(timing.clock_mhz, 1),
        "mean_power_w": round(timing.power_w, 1),
        "layer_mj": round(1e3 * timing.layer_j, 2),
    }
