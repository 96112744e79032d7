"""least_decode_kv_tokens: how much of the KV cache a batch's decodes must read for a plan to be worth its cuts."""

from __future__ import annotations

from collections.abc import Mapping

from nanoflow_backend.schedule.plan import Schedule
from nanoflow_backend.schedule.presets import sequential
from nanoflow_search.cost.model import Workload
from nanoflow_search.cost.work import Mix
from nanoflow_search.plan.batch_case import Case
from nanoflow_search.predict.predict import predict
from nanoflow_search.predict.timing_model import Measured

STEPS = 32  # of the ramp
MARGIN = 0.0075  # that a plan must gain: predictions of gains are not better than that


def least_decode_kv_tokens(case: Case, schedule: Schedule, gains: Mapping[str, float]) -> int:
    """From there on `schedule` gains, on every workload; 0: it gains on all batches of its size.

    `gains`: by workload, over sequential, as measured in the steady state. Predictions are corrected by what they are
    off there. What won there runs there, whatever its margin.
    """
    return max(_least(case, schedule, workload, gain) for workload, gain in gains.items())


def _least(case: Case, schedule: Schedule, workload: str, measured_gain: float) -> int:
    ramp = [ramping(Workload.parse(workload), case.mix(workload), step / STEPS) for step in range(STEPS + 1)]
    predicted = [_gain(case, schedule, mix) for mix in ramp]
    needed = (1 + MARGIN) * predicted[-1] / measured_gain
    losing = [step for step, gain in enumerate(predicted[:-1]) if gain < needed]
    least = ramp[max(losing, default=-1) + 1]
    return round(least.decode_tokens * least.decode_context)


def ramping(workload: Workload, steady: Mix, share: float) -> Mix:
    """A batch as large as the steady one while an engine that was empty fills up, once this share of its requests runs.

    Prompts take the place of the decodes that are still to come. Requests began at an even rate, and none has ended:
    they have the same share of their output, and half of that on average.
    """
    decodes = share * steady.decode_tokens
    context = workload.prompt_tokens + share * workload.output_tokens / 2
    return Mix(decodes, steady.tokens - decodes, context, steady.prefill_context)


def _gain(case: Case, schedule: Schedule, mix: Mix) -> float:
    """Over sequential, as predicted."""
    measured, model = Measured(case.profile, mix), case.setting.model
    plans = (sequential(model.layer, case.tokens), schedule)
    alone_us, layer_us = (predict(plan, measured, model.num_layers).layer_us for plan in plans)
    return alone_us / layer_us
