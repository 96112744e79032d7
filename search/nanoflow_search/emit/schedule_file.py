"""answer: the schedule file of a search: for each range of batch sizes what was fastest, and the account of it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import NamedTuple

from msgspec.structs import replace

from nanoflow_backend.schedule.file import Header, ScheduleFile, Trial, fingerprint
from nanoflow_backend.schedule.plan import Schedule
from nanoflow_backend.schedule.presets import sequential
from nanoflow_search.cost.batch_sizes import TILE
from nanoflow_search.emit.threshold import least_decode_kv_tokens
from nanoflow_search.emit.trials import Gain, Refined, mean_timing
from nanoflow_search.plan.batch_case import Case
from nanoflow_search.plan.candidates import Candidate, Prediction
from nanoflow_search.predict.predict import Timing

SOLVER = "HiGHS"
SMALL = 0.75  # of the smallest size that was timed: smaller batches run sequential


class Planned(NamedTuple):
    """What is known of batches of one size before anything is timed."""

    case: Case
    plans: list[Candidate]  # the first is sequential
    predictions: list[Prediction]  # of all of them
    bounds_us: dict[str, float]


class Outcome(NamedTuple):
    """The same, and how the plans that are not sequential fared."""

    case: Case
    plans: list[Candidate]
    predictions: list[Prediction]
    bounds_us: dict[str, float]
    refined: Refined

    @property
    def winner(self) -> Candidate:
        return self.plans[0 if self.refined.chosen is None else self.refined.chosen + 1]

    @property
    def ordered(self) -> tuple[Schedule, ...]:
        """The plans for batches of this size: the winner for those whose decodes read enough, sequential for others."""
        whole, chosen = self.plans[0].schedule, self.refined.chosen
        if chosen is None:
            return (whole,)
        gains = {name: trial.gain.mean for name, trial in self.refined.trials[chosen].by_workload.items()}
        least = least_decode_kv_tokens(self.case, self.winner.schedule, gains)
        winner = replace(self.winner.schedule, least_decode_kv_tokens=least)
        return (winner, whole) if least else (winner,)

    def trials(self) -> list[Trial]:
        return [trial for workload in self.case.setting.workloads for trial in self._trials_on(workload)]

    def _trials_on(self, workload: str) -> list[Trial]:
        found = [trials.by_workload[workload] for trials in self.refined.trials]
        alone = self._trial(self.plans[0], workload, mean_timing([t.sequential for t in found]), Gain(1.0, 1.0, 1.0))
        others = zip(self.plans[1:], found, strict=True)
        return [alone, *(self._trial(plan, workload, trial.timing, trial.gain) for plan, trial in others)]

    def _trial(self, plan: Candidate, workload: str, timing: Timing, gain: Gain) -> Trial:
        tokens, layers = self.case.tokens, self.case.setting.model.num_layers
        return Trial(
            plan=plan.name,
            dense_batch_tokens=tokens,
            workload=workload,
            predicted_us=next(p.layer_us for p in self.predictions if (p.plan, p.workload) == (plan.name, workload)),
            measured_us=timing.layer_us,
            gain=gain.mean,
            gain_low=gain.low,
            gain_high=gain.high,
            power_w=timing.power_w,
            clock_mhz=timing.clock_mhz,
            token_mj=1e3 * timing.layer_j * layers / tokens,
            chosen=plan is self.winner,
        )


def answer(outcomes: Sequence[Outcome]) -> tuple[ScheduleFile, Candidate]:
    """With the plan at B_dense: the size that runs most tokens a second. `outcomes`: by ascending size."""
    trials = [trial for outcome in outcomes for trial in outcome.trials()]
    won = {o.case.tokens: [t for t in trials if t.chosen and t.dense_batch_tokens == o.case.tokens] for o in outcomes}
    best = max(outcomes, key=lambda o: o.case.tokens / mean(t.measured_us for t in won[o.case.tokens]))
    setting, profile, tokens = best.case.setting, best.case.profile, best.case.tokens
    header = Header(
        model_fingerprint=fingerprint(*setting.model.layers),
        precision=setting.precision,
        device=profile.header.device,
        device_sms=profile.header.device_sms,
        tensor_parallel=setting.ranks,
        dense_batch_tokens=tokens,
        workloads=setting.workloads,
        profile_hash=profile.hash(),
        solver=SOLVER,
        gap=best.winner.gap,
        predicted_us=mean(trial.predicted_us for trial in won[tokens]),
        measured_us=mean(trial.measured_us for trial in won[tokens]),
    )
    file = ScheduleFile(header=header, plans=_ranges(outcomes), trials=tuple(trials), bounds_us=best.bounds_us)
    return file, best.winner


def _ranges(outcomes: Sequence[Outcome]) -> tuple[Schedule, ...]:
    """Batches far smaller than any that was timed run sequential; of sizes that all run sequential the largest is
    enough."""
    smallest = outcomes[0].case
    small = sequential(smallest.setting.model.layer, int(SMALL * smallest.tokens) // TILE * TILE)
    sizes = [(small,), *(outcome.ordered for outcome in outcomes)]
    cut = [False, *(outcome.refined.chosen is not None for outcome in outcomes), True]
    kept = (plans for plans, here, larger in zip(sizes, cut, cut[1:], strict=False) if here or larger)
    return tuple(plan for plans in kept for plan in plans)
