"""A whole run is predicted by the engine's scheduler, with steps that take what a profile predicts of their batches.

No GPU is needed, so that settings that lose here need no time on one. The LM head counts as a product that is as fast
as the widest one of a layer, or as that would be on operands of 16 bits. Sampling, and what a step costs on the host,
are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from msgspec.structs import replace

from nanoflow_backend.bench.simulator import EOS, simulate
from nanoflow_backend.bench.trace import Trace
from nanoflow_backend.bench.workload import Workload
from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.model_config import ModelConfig
from nanoflow_backend.config.quantization import FP8
from nanoflow_backend.graph.model import Model
from nanoflow_backend.graph.operation import Parameter, Resource
from nanoflow_backend.models.model import build
from nanoflow_backend.schedule.plan import Schedule
from nanoflow_backend.schedule.source import find_schedules, named_dense_batch_tokens
from nanoflow_backend.scheduler.batch import Batch
from nanoflow_backend.scheduler.limits import SchedulerLimits
from nanoflow_backend.scheduler.scheduler import Scheduler
from nanoflow_search.cost.batch_sizes import TILE
from nanoflow_search.cost.devices import FP8_TIME
from nanoflow_search.cost.workload import Mix
from nanoflow_search.plan.partitions import best_by_grid
from nanoflow_search.predict.predict import predict
from nanoflow_search.predict.timing_model import TimingModel
from nanoflow_search.profile.data import Profile
from nanoflow_search.profile.load import ProfileError

GRAIN = 32  # tokens: steps whose decodes, rows and mean contexts differ by less are taken to last as long
COARSE_GRAIN = 128  # the same where each kind of step gets a plan of its own


class StepTimes:
    """Says how long a step takes under the first of `plans` that holds its batch.

    `pad` gives the tokens that a batch is padded to. With `best`, a step runs under the best plan of two nano-batches
    for its own batch where that is faster: about what the best schedule file could do. `under_s` sums up the seconds
    under each plan.
    """

    def __init__(
        self,
        model: Model,
        profile: Profile,
        plans: Sequence[Schedule],
        dense_batch_tokens: int,
        pad: Callable[[int], int],
        best: bool = False,
    ) -> None:
        self._model, self._profile, self._plans, self._most = model, profile, plans, dense_batch_tokens
        self._pad, self._best, self._grain = pad, best, COARSE_GRAIN if best else GRAIN
        products = [op.name for op in model.layer.operations if op.resource is Resource.COMPUTE]
        self._widest = max(products, key=self._columns)
        self._head_time = 1 / FP8_TIME if self._weight(self._widest).dtype == FP8 else 1.0  # over the widest product's
        self._known: dict[tuple[int, ...], float] = {}
        self.under_s = [0.0] * len(plans)

    def __call__(self, batch: Batch) -> float:
        """Return the seconds of a step."""
        decodes, rows = len(batch.decode_positions), len(batch.sampled_slots)
        read = sum(batch.decode_positions) + decodes
        chunks = [(len(p.token_ids), p.start + (len(p.token_ids) + 1) / 2) for p in batch.prefills]
        seen = sum(tokens * context for tokens, context in chunks) / max(batch.tokens - decodes, 1)
        tokens = min(self._pad(batch.tokens), self._most)
        number = next(n for n, plan in enumerate(self._plans) if plan.holds(tokens, read))
        mix = Mix(decodes, tokens - decodes, read / max(decodes, 1), seen)
        key = (number, tokens, *(round(x / self._grain) for x in (decodes, mix.decode_context, seen, rows)))
        if key not in self._known:
            self._known[key] = self._predicted_s(self._plans[number], mix, rows)
        self.under_s[number] += self._known[key]
        return self._known[key]

    def _predicted_s(self, plan: Schedule, mix: Mix, rows: int) -> float:
        timing_model, layers = TimingModel(self._profile, mix), self._model.num_layers
        tried = [fitted(plan, round(mix.tokens))]
        if self._best and mix.decode_tokens and mix.tokens >= 2 * TILE:
            tried.append(best_by_grid(self._model.layer, timing_model, layers))
        timing = min((predict(schedule, timing_model, layers) for schedule in tried), key=lambda found: found.layer_us)
        vocabulary = next(p.shape[0] for p in self._model.head.parameters if len(p.shape) == 2)
        widest = self._profile.surface(self._widest, timing.clock_mhz)
        of_widest = vocabulary / self._columns(self._widest) * self._head_time
        head_us = widest.duration_us(rows, None) * of_widest if rows else 0.0
        return 1e-6 * (layers * timing.layer_us + head_us)

    def _columns(self, operation: str) -> int:
        return self._weight(operation).shape[-2]

    def _weight(self, operation: str) -> Parameter:
        graph = self._model.layer
        return next(p for p in graph.parameters if p.name == graph[operation].parameters[0])


def fitted(plan: Schedule, tokens: int) -> Schedule:
    """Return a plan as the engine runs it on a batch of fewer tokens."""
    launches = tuple(
        replace(launch, start=start, stop=stop)
        for launch, (start, stop) in zip(plan.launches, plan.fit(tokens), strict=True)
    )
    return replace(plan, tokens=tokens, launches=launches, groups=plan.fit_groups(tokens))


def predict_run(
    named: EngineConfig,
    shape: ModelConfig,
    profile: Profile,
    work: Workload,
    pad: Callable[[int], int],
    best: bool = False,
) -> dict[str, Any]:
    """Predict a run of all requests of `work`, which are there at once, under the settings `named`.

    Returns:
        The facts that a result shows.

    Raises:
        ConfigError: the settings do not fit the model or the profile's device.
        ProfileError: the profile was taken of another layer, precision or number of ranks.
        ValueError: the settings do not say how many tokens the KV cache holds.
    """
    if named.kv_cache_tokens is None:
        raise ValueError("--set kv_cache_tokens=N: expected how many tokens the KV cache holds, since no GPU says so")
    config = replace(named, dense_batch_tokens=named_dense_batch_tokens(named)).settle("cuda")
    model, device = build(shape), profile.header
    if mismatch := device.mismatch(model.layer, config.precision, 1):
        raise ProfileError(f"the profile {mismatch}")
    plans = find_schedules(config, model, device.device, device.device_sms)
    limits = SchedulerLimits(
        dense_batch_tokens=config.dense_batch_tokens,
        chunk_tokens=config.chunk_tokens,
        prompt_tokens=config.prompt_tokens,
        max_running=config.max_running,
        max_queue_size=len(work.lengths),
        num_pages=named.kv_cache_tokens // config.page_tokens,
        page_tokens=config.page_tokens,
        max_model_tokens=config.max_model_tokens or shape.max_model_tokens,
    )
    times = StepTimes(model, profile, plans, config.dense_batch_tokens, pad, best)
    found = simulate(
        Trace(work.lengths, (0.0,) * len(work.lengths)),
        Scheduler(limits, eos_token_ids=[EOS], prefix_caching=False),
        dense_batch_tokens=config.dense_batch_tokens,
        max_running=config.max_running,
        max_tokens=None,
        step_s=times,
    )
    under = [
        {"tokens": p.tokens, "least_decode_kv_tokens": p.least_decode_kv_tokens, "lanes": p.lanes, "seconds": s}
        for p, s in zip(plans, times.under_s, strict=True)
    ]
    return {
        "requests": found.requests,
        "total_tokens_per_s": round((found.input_tokens + found.output_tokens) / found.simulated_s, 1),
        "wall_s": round(found.simulated_s, 3),
        "steps": found.steps,
        "preemptions": found.preemptions,
        **({} if best else {"under": under}),
    }
