"""answer: the schedule file of a search: for each range of batch sizes what was fastest, and the account of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

from nanoflow_backend.schedule.file import Header, ScheduleFile, Trial, fingerprint
from nanoflow_backend.schedule.plan import Schedule
from nanoflow_backend.schedule.presets import sequential
from nanoflow_search.candidates import Candidate, Prediction
from nanoflow_search.predict import Timing
from nanoflow_search.profile import Profile
from nanoflow_search.refine import Gain, Refined, mean_timing
from nanoflow_search.setting import Setting
from nanoflow_search.sizes import TILE

SOLVER = "HiGHS"
SMALL = 0.75  # of the smallest size that was timed: smaller batches run sequential


def answer(
    setting: Setting,
    profile: Profile,
    plans: Mapping[int, Sequence[Candidate]],
    predictions: Mapping[int, Sequence[Prediction]],
    refined: Mapping[int, Refined],
    bounds_us: Mapping[int, Mapping[str, float]],
) -> ScheduleFile:
    """All by tokens of the batch; the first of `plans` is sequential, those of `refined` are the others."""
    trials = [
        trial
        for tokens, found in refined.items()
        for trial in _trials(setting, tokens, plans[tokens], predictions[tokens], found)
    ]
    chosen = [trial for trial in trials if trial.chosen]
    speed = {tokens: tokens / mean(t.measured_us for t in chosen if t.dense_batch_tokens == tokens) for tokens in plans}
    best = max(speed, key=speed.__getitem__)
    of_best = [trial for trial in chosen if trial.dense_batch_tokens == best]
    header = Header(
        model_fingerprint=fingerprint(setting.model.layer),
        device=profile.header.device,
        device_sms=profile.header.device_sms,
        tensor_parallel=setting.ranks,
        dense_batch_tokens=best,
        workloads=setting.workloads,
        profile_hash=profile.hash(),
        solver=SOLVER,
        gap=plans[best][winner(refined[best])].gap,
        predicted_us=mean(trial.predicted_us for trial in of_best),
        measured_us=mean(trial.measured_us for trial in of_best),
    )
    return ScheduleFile(
        header=header,
        plans=_ranges(setting, plans, refined),
        trials=tuple(trials),
        bounds_us=dict(bounds_us[best]),
    )


def _ranges(
    setting: Setting, plans: Mapping[int, Sequence[Candidate]], refined: Mapping[int, Refined]
) -> tuple[Schedule, ...]:
    """The winners by size. Batches far smaller than any that was timed run sequential: cuts cost them most."""
    graph = setting.model.layer
    least = max(int(SMALL * min(plans)) // TILE * TILE, 1)
    chosen = [plans[tokens][winner(refined[tokens])].schedule for tokens in sorted(plans)]
    found = [sequential(graph, least), *chosen]
    splits = [plan != sequential(graph, plan.tokens) for plan in found]
    larger = [*splits[1:], True]
    return tuple(plan for plan, split, next_split in zip(found, splits, larger, strict=True) if split or next_split)


def _trials(
    setting: Setting, tokens: int, plans: Sequence[Candidate], predictions: Sequence[Prediction], refined: Refined
) -> list[Trial]:
    predicted_us = {(p.plan, p.workload): p.layer_us for p in predictions}

    def trial(plan: Candidate, workload: str, timing: Timing, gain: Gain, chosen: bool) -> Trial:
        return Trial(
            plan=plan.name,
            dense_batch_tokens=tokens,
            workload=workload,
            predicted_us=predicted_us[plan.name, workload],
            measured_us=timing.layer_us,
            gain=gain.mean,
            gain_low=gain.low,
            gain_high=gain.high,
            power_w=timing.power_w,
            clock_mhz=timing.clock_mhz,
            token_mj=1e3 * timing.layer_j * setting.model.num_layers / tokens,
            chosen=chosen,
        )

    workloads = setting.workloads
    rows = [
        trial(
            plans[0],
            w,
            mean_timing([t.by_workload[w].sequential for t in refined.trials]),
            Gain(1, 1, 1),
            not winner(refined),
        )
        for w in workloads
    ]
    for number, (plan, found) in enumerate(zip(plans[1:], refined.trials, strict=True), 1):
        won = number == winner(refined)
        rows += [trial(plan, w, found.by_workload[w].timing, found.by_workload[w].gain, won) for w in workloads]
    return rows


def winner(refined: Refined) -> int:
    """Its number among the plans of its size; 0: sequential."""
    return 0 if refined.chosen is None else refined.chosen + 1
