"""What a whole run takes, by a profile: all requests at once through the engine's scheduler, each step as predicted.

    python benchmarks/predict_run.py --model benchmarks/models/llama-3-8b --profile profile.json --workload 512/1024 \\
        --requests 1200 --schedule plan.json --dense-batch-tokens 1536 --prompt-tokens 448

No GPU is needed: settings that lose here need no time on one. The LM head counts as a product as fast as the widest
one of a layer; sampling, and whatever a step takes beside, are not counted.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from msgspec.structs import replace
from nanoflow_search.measured import Measured
from nanoflow_search.predict import predict
from nanoflow_search.profile import Profile
from nanoflow_search.work import Mix

from nanoflow_backend.commands import workload
from nanoflow_backend.config import ModelConfig
from nanoflow_backend.graph.operation import Model, Resource
from nanoflow_backend.models.model import build
from nanoflow_backend.runtime.cuda import bucket
from nanoflow_backend.schedule.file import ScheduleFile
from nanoflow_backend.schedule.plan import Schedule
from nanoflow_backend.schedule.presets import sequential
from nanoflow_backend.scheduler.batch import Batch
from nanoflow_backend.scheduler.scheduler import Scheduler
from nanoflow_backend.scheduler.simulator import EOS, simulate
from nanoflow_backend.scheduler.trace import Trace

PAGE_TOKENS = 64
MAX_MODEL_TOKENS = 8192
GRAIN = 32  # tokens: steps whose decodes, prompts and mean contexts differ by less take as long


class StepTimes:
    """How long steps take, each under the first of `plans` that holds it; `under_s`: how long all under each plan."""

    def __init__(self, model: Model, profile: Profile, plans: Sequence[Schedule], dense_batch_tokens: int) -> None:
        self._model, self._profile, self._plans, self._most = model, profile, plans, dense_batch_tokens
        products = [op.name for op in model.layer.operations if op.resource is Resource.COMPUTE]
        self._widest = max(products, key=self._columns)
        self._known: dict[tuple[int, ...], float] = {}
        self.under_s: Counter[int] = Counter()

    def __call__(self, batch: Batch) -> float:
        decodes, rows = len(batch.decode_positions), len(batch.sampled_slots)
        read = sum(batch.decode_positions) + decodes
        chunks = [(len(p.token_ids), p.start + (len(p.token_ids) + 1) / 2) for p in batch.prefills]
        seen = sum(tokens * context for tokens, context in chunks) / max(batch.tokens - decodes, 1)
        tokens = min(bucket(batch.tokens), self._most)
        number = next(n for n, plan in enumerate(self._plans) if plan.holds(tokens, read))
        mix = Mix(decodes, tokens - decodes, read / max(decodes, 1), seen)
        key = (number, tokens, *(round(x / GRAIN) for x in (decodes, mix.decode_context, seen, rows)))
        if key not in self._known:
            self._known[key] = self._predicted_s(self._plans[number], mix, rows)
        self.under_s[number] += self._known[key]
        return self._known[key]

    def _predicted_s(self, plan: Schedule, mix: Mix, rows: int) -> float:
        timing = predict(fitted(plan, round(mix.tokens)), Measured(self._profile, mix), self._model.num_layers)
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
    parser.add_argument("--schedule", default="sequential", help="or a schedule file")
    parser.add_argument("--dense-batch-tokens", type=int, default=2048)
    parser.add_argument("--prompt-tokens", type=int, help="default: as B_dense")
    parser.add_argument("--kv-cache-tokens", type=int, default=950_000)
    options = parser.parse_args()
    model = build(ModelConfig.from_pretrained(options.model))
    most = options.dense_batch_tokens
    whole = sequential(model.layer, most)
    plans = [whole]
    if options.schedule != "sequential":
        plans = [plan for plan in ScheduleFile.load(Path(options.schedule)).plans if plan.tokens <= most]
        plans += [whole] * (plans[-1].tokens < most)
    times = StepTimes(model, Profile.load(options.profile), plans, most)
    if options.trace:
        work = workload.of_trace(options.trace, options.requests, MAX_MODEL_TOKENS)
    else:
        work = workload.constant(*map(int, options.workload.split("/")), options.requests)
    scheduler = Scheduler(
        dense_batch_tokens=most,
        chunk_tokens=most,
        prompt_tokens=options.prompt_tokens or most,
        max_running=most,
        max_queue_size=options.requests,
        num_pages=options.kv_cache_tokens // PAGE_TOKENS,
        page_tokens=PAGE_TOKENS,
        max_model_tokens=MAX_MODEL_TOKENS,
        eos_token_ids=[EOS],
        prefix_caching=False,
    )
    trace = Trace(work.lengths, (0.0,) * options.requests)
    found = simulate(trace, scheduler, dense_batch_tokens=most, max_running=most, max_tokens=None, step_s=times)
    total = found.input_tokens + found.output_tokens
    print(f"{total / found.simulated_s:,.0f} tokens/s; {found.simulated_s:.1f} s, {found.steps:,} steps; of these")
    for number, plan in enumerate(plans):
        kind = "sequential" if len(plan.lanes) == 1 else "overlapped"
        print(
            f"  {times.under_s[number]:5.1f} s {kind} for {plan.tokens:,} tokens, {plan.least_decode_kv_tokens:,} read"
        )


if __name__ == "__main__":
    main()
