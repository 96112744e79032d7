"""One request alone: ms of a decode step of the whole engine, and its share of the weight-read bound, by variant.

    python benchmarks/single_stream.py --model benchmarks/models/llama-3-8b

Every variant is an engine of its own on the same random weights. KV pages and tokens of all must be, bit for bit, those
of the first, whose kernels wait for one another to end.
"""

from __future__ import annotations

import gc
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from nanoflow_kernels import attention_decode, attention_work, chain, few_tokens
from nanoflow_kernels.few_tokens import Plan

from nanoflow_backend.commands import result
from nanoflow_backend.commands.breakdown import break_down
from nanoflow_backend.commands.workload import constant
from nanoflow_backend.engine import Engine, SamplingParams
from nanoflow_backend.models import weights
from nanoflow_backend.scheduler.request import Request

READ_BYTES_PER_S = 4.375e12
TOKENS = 16
Variant = dict[tuple[Any, str], Any]
FEW, WIDE = (few_tokens, "FEW_ROWS"), (few_tokens, "MANY_ROWS")
GATHERED: Variant = {(attention_decode, "BULK_TAIL"): False, (attention_decode, "TAIL_STAGES"): 1}
VARIANTS: dict[str, Variant] = {
    "unchained": {(chain, "ROWS"): 0},
    "chained": {},
    "share 1": {(attention_work, "SHARE_TILES"): 1},
    "share 4": {(attention_work, "SHARE_TILES"): 4},
    "gathered tail": GATHERED,
    "few: 32 rows": {FEW: Plan(32, 256, 4, 2, 2048)},
    "few: 32 rows, 8 KiB ahead": {FEW: Plan(32, 256, 4, 2, 8192)},
    "few: 32 rows, 512 deep": {FEW: Plan(32, 512, 3, 2, 4096)},
    "few: 64 rows, 8 KiB ahead": {FEW: Plan(64, 256, 4, 1, 8192)},
    "gate_up: 32 rows": {WIDE: Plan(32, 128, 6, 3, 1024)},
}


def main(
    model: Annotated[Path, typer.Option()],
    output: Annotated[Path | None, typer.Option()] = None,
    input_tokens: int = 1024,
    steps: int = 150,
    only: Annotated[list[str] | None, typer.Option(help="Variants, beside the first.")] = None,
    profile: Annotated[str | None, typer.Option(help="The variant whose breakdown is shown.")] = None,
) -> None:
    once: dict[str, torch.Tensor] = {}
    make = weights.dummy

    def dummy(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        once.update(once or make(*args, **kwargs))
        return once

    weights.dummy = dummy
    names = [*list(VARIANTS)[:1], *(only or list(VARIANTS)[1:])]
    measured, expected = [], None
    for name in names:
        kept = {(module, field): getattr(module, field) for module, field in VARIANTS[name]}
        for (module, field), value in VARIANTS[name].items():
            setattr(module, field, value)
        try:
            facts, got = measure(model, input_tokens, steps, name == profile)
        finally:
            for (module, field), value in kept.items():
                setattr(module, field, value)
        expected = expected or got
        same = got[0] == expected[0] and torch.equal(got[1], expected[1])
        measured.append({"variant": name, **facts, "same_bits": same})
        print({k: v for k, v in measured[-1].items() if k != "breakdown"}, flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    result.write({"input_tokens": input_tokens, "steps": steps, "variants": measured}, output)


def measure(model: Path, input_tokens: int, steps: int, profiled: bool) -> tuple[dict[str, Any], tuple[Any, ...]]:
    engine = Engine.from_pretrained(
        model, load_format="dummy", dense_batch_tokens=TOKENS, kv_cache_tokens=8192, max_model_tokens=4096
    )
    prompt = next(iter(constant(input_tokens, steps, 1).prompts(engine.model_config.vocab_size)))
    params = SamplingParams(max_tokens=steps + 100, ignore_eos=True, temperature=0.0)
    engine.add(Request(0, prompt, params))
    tokens: list[int] = []

    def step() -> None:
        for delta in engine.step():
            tokens.extend(delta.token_ids)

    while len(tokens) < 20:
        step()
    times = []
    for _ in range(3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(steps // 3):
            step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) / (steps // 3) * 1e3)
    program = engine.worker.program
    facts: dict[str, Any] = {"step_ms": round(statistics.median(times), 4), "runs_ms": [round(t, 4) for t in times]}
    graph = program._graphs[min(program._graphs)]
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    got = tokens[:steps], program.binding.kv.clone()
    begin_event.record()
    for _ in range(50):
        graph.replay()
    end_event.record()
    torch.cuda.synchronize()
    facts["layers_ms"] = round(begin_event.elapsed_time(end_event) / 50, 4)
    read = sum(w.numel() * w.element_size() for name, w in program.binding.weights.items() if "embed" not in name)
    facts["bound_ms"] = round(read / READ_BYTES_PER_S * 1e3, 4)
    facts["share"] = round(facts["bound_ms"] / facts["step_ms"], 4)
    if profiled:
        facts["breakdown"] = break_down(engine, step)
    return facts, got


if __name__ == "__main__":
    typer.run(main)
