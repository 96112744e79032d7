"""One request alone: ms of a decode step of the whole engine, and its share of the weight-read bound.

    python benchmarks/single_stream.py --model benchmarks/models/llama-3-8b

Once with kernels that wait for one another to end and once as they are (chain.py), on the same random weights: tokens
and KV pages of both must be the same, bit for bit.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from nanoflow_kernels import chain

from nanoflow_backend.commands import result
from nanoflow_backend.commands.workload import constant
from nanoflow_backend.engine import Engine, SamplingParams
from nanoflow_backend.scheduler.request import Request

READ_BYTES_PER_S = 4.375e12  # one H200, measured
TOKENS = 16  # of the dense batch
WARM_TOKENS, RUNS = 20, 3


def main(
    model: Annotated[Path, typer.Option()],
    output: Annotated[Path | None, typer.Option()] = None,
    input_tokens: int = 1024,
    steps: int = 300,
) -> None:
    engine = functools.partial(
        Engine.from_pretrained,
        model,
        load_format="dummy",
        dense_batch_tokens=TOKENS,
        kv_cache_tokens=8192,
        max_model_tokens=4096,
    )
    chained_rows, chain.ROWS = chain.ROWS, 0
    apart, expected, _ = measure(engine(), input_tokens, steps)
    gc.collect()
    torch.cuda.empty_cache()
    chain.ROWS = chained_rows
    chained, got, read_bytes = measure(engine(), input_tokens, steps)
    if got[0] != expected[0] or not torch.equal(got[1], expected[1]):
        raise RuntimeError("kernels that start early gave other tokens or pages")
    bound_ms = read_bytes / READ_BYTES_PER_S * 1e3
    content = {
        "model": model.name,
        "workload": f"{input_tokens}/{steps} alone",
        "step_ms": round(statistics.median(chained), 4),
        "step_ms_of_runs": [round(ms, 4) for ms in chained],
        "step_ms_kernels_apart": round(statistics.median(apart), 4),
        "bound_ms": round(bound_ms, 4),
        "output_tokens_per_s": round(1e3 / statistics.median(chained), 1),
        "share_of_weight_read_bound": round(bound_ms / statistics.median(chained), 4),
    }
    result.write(content, output)


def measure(engine: Engine, input_tokens: int, steps: int) -> tuple[list[float], tuple[list[int], torch.Tensor], int]:
    """ms a step of each run; the tokens and pages at their end; bytes of the weights that a step reads."""
    prompt = next(iter(constant(input_tokens, steps, 1).prompts(engine.model_config.vocab_size)))
    engine.add(Request(0, prompt, SamplingParams(max_tokens=steps + 100, ignore_eos=True, temperature=0.0)))
    tokens: list[int] = []

    def step() -> None:
        for delta in engine.step():
            tokens.extend(delta.token_ids)

    while len(tokens) < WARM_TOKENS:
        step()
    times = []
    for _ in range(RUNS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(steps // RUNS):
            step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) / (steps // RUNS) * 1e3)
    binding = engine.worker.program.binding
    read = sum(w.numel() * w.element_size() for name, w in binding.weights.items() if "embed" not in name)
    return times, (tokens[:steps], binding.kv.clone()), read


if __name__ == "__main__":
    typer.run(main)
