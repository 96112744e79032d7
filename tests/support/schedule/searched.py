"""Plans as a search finds them, for tiny models: on a synthetic device that is as slow as they are small."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

from msgspec.structs import replace
from nanoflow_search.checkpoint import Run
from nanoflow_search.cost.devices import DEVICES
from nanoflow_search.cost.workload import Mix
from nanoflow_search.hardware.synthetic import SyntheticDevice
from nanoflow_search.plan.op_graph import layer_problem, schedule_of
from nanoflow_search.plan.two_stages import find_plans
from nanoflow_search.predict.timing_model import TimingModel
from nanoflow_search.profile.points import shared_loads
from nanoflow_search.request import Effort
from support.schedule.schedules import random_schedule
from support.simulated.profiles import profiled

from nanoflow_backend.config.precision import FLOAT32
from nanoflow_backend.graph.model import Model
from nanoflow_backend.runtime.device import Device
from nanoflow_backend.schedule.file import Header, ScheduleFile, fingerprint
from nanoflow_backend.schedule.plan import Schedule
from nanoflow_backend.schedule.presets import sequential

SLOWER = 1e-5  # than the real one: so that launches take longer than it takes to begin them


def searched(model: Model, tokens: int, parts: int = 4) -> list[Schedule]:
    """All the plans that are found for batches of `tokens`, cut at multiples of a `parts`-th of them."""
    fast = DEVICES["H200-sustained"]
    spec = dataclasses.replace(
        fast, flop_per_s=SLOWER * fast.flop_per_s, memory_bytes_per_s=SLOWER * fast.memory_bytes_per_s
    )  # fmt: skip
    device = SyntheticDevice(model.layer, spec, noise=0.0)
    mix = Mix(tokens // 2, tokens - tokens // 2, 8.0 * tokens, 4.0 * tokens)
    profile = profiled(device, model.layer, shared_loads(model.layer, device.sms, mix, 4 * tokens))
    measured, chunk = TimingModel(profile, mix), tokens // parts
    problem = layer_problem(model.layer, 1, tokens, chunk, measured.operations_us)
    plans = find_plans(problem, measured, chunk, Effort(turns=3, time_limit_s=10.0), Run())
    return [schedule_of(model.layer, problem, plan.shares.timeline, chunk, plan.shares.sms) for plan in plans]


def schedule_file(path: Path, model: Model, device: Device, tokens: int, plan: Schedule, seed: int) -> Path:
    """Batches of up to a quarter run sequential, those of up to half under a random plan; of the larger ones those
    under `plan` whose decodes read six tokens of the KV cache for each of `tokens`, or more, the others sequential."""
    assert plan.tokens == tokens
    header = Header(
        model_fingerprint=fingerprint(*model.layers),
        precision=FLOAT32,
        device=device.name,
        device_sms=device.sms,
        tensor_parallel=1,
        dense_batch_tokens=tokens,
    )
    middle = random_schedule(model.layer, tokens // 2, random.Random(seed))
    small, large = (sequential(model.layer, size) for size in (tokens // 4, tokens))
    ScheduleFile(header=header, plans=(small, middle, replace(plan, least_decode_kv_tokens=6 * tokens), large)).save(
        path
    )
    return path
