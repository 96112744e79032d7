"""The schedule file of a search holds the fastest plan for each range of batch sizes, and an account of the search."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import geometric_mean, mean
from typing import NamedTuple

from msgspec.structs import replace

from nanoflow_backend.schedule.file import Header, ScheduleFile, Trial, fingerprint
from nanoflow_backend.schedule.plan import Schedule
from nanoflow_backend.schedule.presets import sequential
from nanoflow_search.cost.batch_sizes import TILE
from nanoflow_search.emit.statistics import Gain, mean_timing
from nanoflow_search.emit.threshold import LEAST_GAIN, least_decode_kv_tokens
from nanoflow_search.emit.trials import TrialResults
from nanoflow_search.plan.batch_case import BatchCase
from nanoflow_search.plan.candidates import Candidate, PlanPrediction
from nanoflow_search.predict.predict import Timing

SOLVER = "HiGHS"
SMALL = 0.75  # of the smallest size that was timed: smaller batches run sequential


class Planned(NamedTuple):
    """What is known of batches of one size before anything is timed."""

    case: BatchCase
    plans: list[Candidate]  # the first one is sequential
    predictions: list[PlanPrediction]  # of all plans on all workloads
    bounds_us: dict[str, float]  # by name; no plan's layer is shorter


class Outcome(NamedTuple):
    """What is known of batches of one size after the trials."""

    planned: Planned
    results: TrialResults  # of all plans but sequential

    @property
    def case(self) -> BatchCase:
        """The batches."""
        return self.planned.case

    @property
    def winner(self) -> Candidate:
        """The plan that won; sequential, if none did."""
        return self.planned.plans[0 if self.results.chosen is None else self.results.chosen + 1]

    @property
    def ordered(self) -> tuple[Schedule, ...]:
        """The plans of this size: the winner for batches whose decodes read enough, then sequential for the others."""
        whole, chosen = self.planned.plans[0].schedule, self.results.chosen
        if chosen is None:
            return (whole,)
        gains = {name: trial.gain.mean for name, trial in self.results.trials[chosen].by_workload.items()}
        least = least_decode_kv_tokens(self.case, self.winner.schedule, gains)
        winner = replace(self.winner.schedule, least_decode_kv_tokens=least)
        return (winner, whole) if least else (winner,)

    def trials(self) -> list[Trial]:
        """Return a row for each plan on each workload, as the schedule file holds them."""
        return [trial for workload in self.case.request.workloads for trial in self._trials_on(workload)]

    def _trials_on(self, workload: str) -> list[Trial]:
        whole, *plans = self.planned.plans
        found = [trials.by_workload[workload] for trials in self.results.trials]
        alone = self._trial(whole, workload, mean_timing([t.sequential for t in found]), Gain(1.0, 1.0, 1.0))
        others = zip(plans, found, strict=True)
        return [alone, *(self._trial(plan, workload, trial.timing, trial.gain) for plan, trial in others)]

    def _trial(self, plan: Candidate, workload: str, timing: Timing, gain: Gain) -> Trial:
        tokens, layers = self.case.tokens, self.case.request.model.num_layers
        predictions = {(p.plan, p.workload): p.layer_us for p in self.planned.predictions}
        return Trial(
            plan=plan.name,
            dense_batch_tokens=tokens,
            workload=workload,
            predicted_us=predictions[plan.name, workload],
            measured_us=timing.layer_us,
            gain=gain.mean,
            gain_low=gain.low,
            gain_high=gain.high,
            power_w=timing.power_w,
            clock_mhz=timing.clock_mhz,
            token_mj=1e3 * timing.layer_j * layers / tokens,
            chosen=plan is self.winner,
        )


def make_schedule_file(outcomes: Sequence[Outcome]) -> tuple[ScheduleFile, Outcome]:
    """Return the schedule file, and the outcome at B_dense: the size that runs most tokens a second.

    `outcomes` ascend by size.
    """
    trials = [trial for outcome in outcomes for trial in outcome.trials()]
    won = {o.case.tokens: [t for t in trials if t.chosen and t.dense_batch_tokens == o.case.tokens] for o in outcomes}
    best = max(outcomes, key=lambda o: o.case.tokens / mean(t.measured_us for t in won[o.case.tokens]))
    request, profile, tokens = best.case.request, best.case.profile, best.case.tokens
    header = Header(
        model_fingerprint=fingerprint(*request.model.layers),
        precision=request.precision,
        device=profile.header.device,
        device_sms=profile.header.device_sms,
        tensor_parallel=request.ranks,
        dense_batch_tokens=tokens,
        workloads=request.workloads,
        profile_hash=profile.hash(),
        solver=SOLVER,
        gap=best.winner.gap,
        predicted_us=mean(trial.predicted_us for trial in won[tokens]),
        measured_us=mean(trial.measured_us for trial in won[tokens]),
    )
    bounds_us = best.planned.bounds_us
    return ScheduleFile(header=header, plans=_ranges(outcomes), trials=tuple(trials), bounds_us=bounds_us), best


def make_predicted_file(planned: Sequence[Planned]) -> ScheduleFile:
    """Return the schedule file of plans that are predicted to win, where nothing could be timed.

    `planned` ascends by size. A plan is taken if it is predicted to gain `LEAST_GAIN` over all workloads; B_dense is
    the size that is predicted to run most tokens a second. The header has no measured time, and there are no trials.
    """
    chosen = [_predicted_winner(found) for found in planned]
    best = max(chosen, key=lambda winner: winner.case.tokens / winner.layer_us)
    request, profile = best.case.request, best.case.profile
    header = Header(
        model_fingerprint=fingerprint(*request.model.layers),
        precision=request.precision,
        device=profile.header.device,
        device_sms=profile.header.device_sms,
        tensor_parallel=request.ranks,
        dense_batch_tokens=best.case.tokens,
        workloads=request.workloads,
        profile_hash=profile.hash(),
        solver=SOLVER,
        gap=best.plan.gap,
        predicted_us=best.layer_us,
    )
    bounds_us = next(found.bounds_us for found in planned if found.case is best.case)
    plans = _ranges_of(planned[0].case, [winner.ordered for winner in chosen], [winner.wins for winner in chosen])
    return ScheduleFile(header=header, plans=plans, bounds_us=bounds_us)


class _PredictedWinner(NamedTuple):
    """What is predicted to be the best plan of a size; sequential, if none is better."""

    case: BatchCase
    plan: Candidate
    layer_us: float  # mean over the workloads
    gains: dict[str, float]  # over sequential, by workload

    @property
    def wins(self) -> bool:
        """Whether it is another plan than sequential."""
        return self.plan.name != "sequential"

    @property
    def ordered(self) -> tuple[Schedule, ...]:
        """The plans of this size, as Outcome has them."""
        whole = sequential(self.case.request.model.layer, self.case.tokens)
        if not self.wins:
            return (whole,)
        least = least_decode_kv_tokens(self.case, self.plan.schedule, self.gains)
        winner = replace(self.plan.schedule, least_decode_kv_tokens=least)
        return (winner, whole) if least else (winner,)


def _predicted_winner(planned: Planned) -> _PredictedWinner:
    us = {(p.plan, p.workload): p.layer_us for p in planned.predictions}
    workloads, (whole, *plans) = planned.case.request.workloads, planned.plans

    def gains(plan: Candidate) -> dict[str, float]:
        return {workload: us[whole.name, workload] / us[plan.name, workload] for workload in workloads}

    best = max(plans, key=lambda plan: geometric_mean(gains(plan).values()), default=whole)
    winner = best if geometric_mean(gains(best).values()) >= 1 + LEAST_GAIN else whole
    layer_us = mean(us[winner.name, workload] for workload in workloads)
    return _PredictedWinner(planned.case, winner, layer_us, gains(winner))


def _ranges(outcomes: Sequence[Outcome]) -> tuple[Schedule, ...]:
    """Return the plans by ascending size.

    Batches far smaller than any that was timed run sequential. Of neighbouring sizes that all run sequential the
    largest is enough.
    """
    return _ranges_of(
        outcomes[0].case,
        [outcome.ordered for outcome in outcomes],
        [outcome.results.chosen is not None for outcome in outcomes],
    )


def _ranges_of(
    smallest: BatchCase, ordered: Sequence[tuple[Schedule, ...]], wins: Sequence[bool]
) -> tuple[Schedule, ...]:
    """See `_ranges`: the plans of each size in their order, and whether one of them is not sequential."""
    small = sequential(smallest.request.model.layer, int(SMALL * smallest.tokens) // TILE * TILE)
    sizes = [(small,), *ordered]
    cut = [False, *wins, True]
    kept = (plans for plans, here, larger in zip(sizes, cut, cut[1:], strict=False) if here or larger)
    return tuple(plan for plans in kept for plan in plans)
