"""The threshold of a plan is how much of the KV cache a batch's decodes must read for the plan to be worth its cuts."""

from __future__ import annotations

from collections.abc import Mapping

from nanoflow_backend.schedule.plan import Schedule
from nanoflow_backend.schedule.presets import sequential
from nanoflow_search.cost.workload import MeanWorkload, Mix, ramp_mix
from nanoflow_search.plan.batch_case import BatchCase
from nanoflow_search.predict.predict import predict
from nanoflow_search.predict.timing_model import TimingModel

RAMP_STEPS = 32  # mixes between an empty engine and the steady state
LEAST_GAIN = 0.0075  # that a plan must promise: predicted gains are not more exact than that


def least_decode_kv_tokens(case: BatchCase, schedule: Schedule, gains: Mapping[str, float]) -> int:
    """Return the KV tokens that a batch's decodes must read for `schedule` to beat sequential on every workload.

    0 means that it does on all batches of its size. `gains` holds the gain over sequential that was measured on each
    workload in the steady state. Predictions are scaled so that they agree with it there. The steady state itself
    always counts, by whatever margin the plan won.
    """
    return max(_least(case, schedule, workload, gain) for workload, gain in gains.items())


def _least(case: BatchCase, schedule: Schedule, workload: str, measured_gain: float) -> int:
    parsed, steady = MeanWorkload.parse(workload), case.mix(workload)
    ramp = [ramp_mix(parsed, steady, step / RAMP_STEPS) for step in range(RAMP_STEPS + 1)]
    predicted = [_gain(case, schedule, mix) for mix in ramp]
    needed = (1 + LEAST_GAIN) * predicted[-1] / measured_gain
    losing = [step for step, gain in enumerate(predicted[:-1]) if gain < needed]
    least = ramp[max(losing, default=-1) + 1]
    return round(least.decode_tokens * least.decode_context)


def _gain(case: BatchCase, schedule: Schedule, mix: Mix) -> float:
    """Return the predicted gain over sequential."""
    timing_model, model = TimingModel(case.profile, mix), case.request.model
    plans = (sequential(model.layer, case.tokens), schedule)
    alone_us, layer_us = (predict(plan, timing_model, model.num_layers).layer_us for plan in plans)
    return alone_us / layer_us
