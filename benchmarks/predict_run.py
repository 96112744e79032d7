"""What a whole run takes, by a profile: all requests at once through the engine's scheduler, each step as predicted.

    python benchmarks/predict_run.py --model benchmarks/models/llama-3-8b --profile profile.json --workload 512/1024 \\
        --set kv_cache_tokens=929000 --set schedule=plan.json --set prompt_tokens=448 --output predicted.json

No GPU is needed: settings that lose here need no time on one. With --best each step, by kinds of COARSE tokens,
runs under the grid's best plan of two nano-batches for it, if that is faster: about what the best file could do. The LM
head counts as a product as fast as the widest one of a layer; sampling, and what a step takes beside, are not counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from msgspec.structs import replace
from nanoflow_search.cost.batch_sizes import TILE
from nanoflow_search.cost.work import Mix
from nanoflow_search.plan.partitions import best_by_grid
from nanoflow_search.predict.predict import predict
from nanoflow_search.predict.timing_model import Measured
from nanoflow_search.profile.data import Profile

from nanoflow_backend.bench import result, workload
from nanoflow_backend.bench.simulator import EOS, simulate
from nanoflow_backend.bench.trace import Trace
from nanoflow_backend.commands import settings
from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.graph.model import Model
from nanoflow_backend.graph.operation import Resource
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.runtime.cuda import bucket
from nanoflow_backend.schedule.plan import Schedule
from nanoflow_backend.schedule.source import find_schedules, named_dense_batch_tokens
from nanoflow_backend.scheduler.batch import Batch
from nanoflow_backend.scheduler.limits import SchedulerLimits
from nanoflow_backend.scheduler.scheduler import Scheduler

GRAIN = 32  # tokens: steps whose decodes, rows and mean contexts differ by less take as long
COARSE = 128  # the same with --best, where each kind of step is planned for


class StepTimes:
    """How long steps take, each under the first of `plans` that holds it; `under_s`: all under each plan.

    With `best`, under the best plan for its own batch, if that is shorter.
    """

    def __init__(
        self,
        model: Model,
        profile: Profile,
        plans: Sequence[Schedule],
        dense_batch_tokens: int,
        best: bool = False,
    ) -> None:
        self._model, self._profile, self._plans, self._most = model, profile, plans, dense_batch_tokens
        self._best, self._grain = best, COARSE if best else GRAIN
        products = [op.name for op in model.layer.operations if op.resource is Resource.COMPUTE]
        self._widest = max(products, key=self._columns)
        self._known: dict[tuple[int, ...], float] = {}
        self.under_s = [0.0] * len(plans)

    def __call__(self, batch: Batch) -> float:
        decodes, rows = len(batch.decode_positions), len(batch.sampled_slots)
        read = sum(batch.decode_positions) + decodes
        chunks = [(len(p.token_ids), p.start + (len(p.token_ids) + 1) / 2) for p in batch.prefills]
        seen = sum(tokens * context for tokens, context in chunks) / max(batch.tokens - decodes, 1)
        tokens = min(bucket(batch.tokens), self._most)
        number = next(n for n, plan in enumerate(self._plans) if plan.holds(tokens, read))
        mix = Mix(decodes, tokens - decodes, read / max(decodes, 1), seen)
        key = (number, tokens, *(round(x / self._grain) for x in (decodes, mix.decode_context, seen, rows)))
        if key not in self._known:
            self._known[key] = self._predicted_s(self._plans[number], mix, rows)
        self.under_s[number] += self._known[key]
        return self._known[key]

    def _predicted_s(self, plan: Schedule, mix: Mix, rows: int) -> float:
        measured, layers, graph = Measured(self._profile, mix), self._model.num_layers, self._model.layer
        tried = [fitted(plan, round(mix.tokens))]
        if self._best and mix.decode_tokens and mix.tokens >= 2 * TILE:
            tried.append(best_by_grid(graph, measured, layers))
        timing = min((predict(schedule, measured, layers) for schedule in tried), key=lambda timing: timing.layer_us)
        vocabulary = next(p.shape[0] for p in self._model.head.parameters if len(p.shape) == 2)
        widest = self._profile.surface(self._widest, timing.clock_mhz)
        head_us = widest.duration_us(rows, None) * vocabulary / self._columns(self._widest) if rows else 0.0
        return 1e-6 * (self._model.num_layers * timing.layer_us + head_us)

    def _columns(self, operation: str) -> int:
        graph = self._model.layer
        return next(p.shape[-2] for p in graph.parameters if p.name == graph[operation].parameters[0])


def fitted(plan: Schedule, tokens: int) -> Schedule:
    """The plan on a batch of fewer tokens, as the engine runs it."""
    launches = tuple(
        replace(launch, start=start, stop=stop)
        for launch, (start, stop) in zip(plan.launches, plan.fit(tokens), strict=True)
    )
    return replace(plan, tokens=tokens, launches=launches, groups=plan.fit_groups(tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a folder with a Hugging Face config.json")
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--workload", default="512/1024", help="tokens of each prompt/output")
    parser.add_argument("--trace", type=Path, help="a CSV file of lengths, drawn as `nanoflow bench offline` does")
    parser.add_argument("--requests", type=int, default=1200)
    parser.add_argument("--set", action="append", default=[], help="FIELD=VALUE of EngineConfig; repeatable")
    parser.add_argument("--best", action="store_true", help="each step under a plan of its own")
    parser.add_argument("--output", type=Path, help="default: standard output")
    asked = parser.parse_args()
    fields = {"model": str(asked.model), **settings.parse(asked.set)}
    named = EngineConfig.resolve(fields, relative_to=Path.cwd())
    if named.kv_cache_tokens is None:
        parser.error("--set kv_cache_tokens=N: expected how many tokens the KV cache holds, since no GPU says so")
    config = replace(named, dense_batch_tokens=named_dense_batch_tokens(named)).settle("cuda")
    shape, profile = read_model_config(asked.model), Profile.load(asked.profile)
    model, of = build(shape), profile.header
    plans = find_schedules(config, model, of.device, of.device_sms)
    most_tokens = config.max_model_tokens or shape.max_model_tokens
    if asked.trace:
        work = workload.of_trace(asked.trace, asked.requests, most_tokens)
    else:
        work = workload.constant(*map(int, asked.workload.split("/")), asked.requests)
    limits = SchedulerLimits(
        dense_batch_tokens=config.dense_batch_tokens,
        chunk_tokens=config.chunk_tokens,
        prompt_tokens=config.prompt_tokens,
        max_running=config.max_running,
        max_queue_size=asked.requests,
        num_pages=named.kv_cache_tokens // config.page_tokens,
        page_tokens=config.page_tokens,
        max_model_tokens=most_tokens,
    )
    scheduler = Scheduler(
        limits,
        eos_token_ids=[EOS],
        prefix_caching=False,
    )
    times = StepTimes(model, profile, plans, config.dense_batch_tokens, asked.best)
    found = simulate(
        Trace(work.lengths, (0.0,) * len(work.lengths)),
        scheduler,
        dense_batch_tokens=config.dense_batch_tokens,
        max_running=config.max_running,
        max_tokens=None,
        step_s=times,
    )
    under = [
        {"tokens": p.tokens, "least_decode_kv_tokens": p.least_decode_kv_tokens, "lanes": p.lanes, "seconds": s}
        for p, s in zip(plans, times.under_s, strict=True)
    ]
    predicted = {
        "kind": "prediction from a profile, nothing measured",
        "device": of.device,
        "profile": profile.hash(),
        "model": asked.model.name,
        "best": asked.best,
        "settings": result.without_folders(settings.parse(asked.set)),
        "workload": work.name,
        "requests": found.requests,
        "total_tokens_per_s": round((found.input_tokens + found.output_tokens) / found.simulated_s, 1),
        "wall_s": round(found.simulated_s, 3),
        "steps": found.steps,
        "preemptions": found.preemptions,
        **({} if asked.best else {"under": under}),
    }
    result.write(predicted, asked.output)


if __name__ == "__main__":
    main()
