"""The same requests go through tritonserver as gRPC streams, and to the engine alone, to see what serving costs.

Clients, server, stub and engine share the machine's cores, so the served rate is a floor.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from benchmarks.server import serve_model
from nanoflow_backend.bench import result
from nanoflow_backend.commands.demo import stream_grpc
from nanoflow_backend.engine import LLM, SamplingParams


def main(
    model: Annotated[Path, typer.Option(help="Hugging Face folder.")],
    output: Annotated[Path | None, typer.Option(help="Where the JSON result goes; default: standard output.")] = None,
    concurrency: Annotated[int, typer.Option(help="Streams at once.")] = 64,
    max_tokens: Annotated[int, typer.Option(help="Of each request.")] = 256,
    rounds: int = 5,
) -> None:
    """What serving costs: the same requests through tritonserver as gRPC streams, and by the engine alone."""
    prompts = [f"The {number}th statement" for number in range(concurrency)]
    llm = LLM.from_pretrained(model)
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)

    def alone(_: int) -> float:
        start = time.perf_counter()
        tokens = sum(len(completion.token_ids) for completion in llm.generate(prompts, params))
        return tokens / (time.perf_counter() - start)

    def one(url: str, prompt: str) -> tuple[int, int]:
        news = [new for _, new in stream_grpc(url, prompt, max_tokens=max_tokens, temperature="0", ignore_eos=True)]
        return sum(news), len(news)

    def served(url: str) -> tuple[float, float]:
        start = time.perf_counter()
        with ThreadPoolExecutor(concurrency) as pool:
            counts = list(pool.map(one, [url] * concurrency, prompts))
        tokens, responses = (sum(column) for column in zip(*counts, strict=True))
        assert tokens == concurrency * max_tokens, "every token arrived"
        return tokens / (time.perf_counter() - start), tokens / responses

    engine_rates = [alone(n) for n in range(rounds + 1)][1:]
    with serve_model(model) as server:
        runs = [served(server.grpc_url) for _ in range(rounds + 1)][1:]
    served_rates = [rate for rate, _ in runs]
    result.write(
        {
            "streams": concurrency,
            "max_tokens": max_tokens,
            "rounds": rounds,
            "engine_tokens_per_s": round(median(engine_rates), 1),
            "engine_tokens_per_s_range": [round(min(engine_rates), 1), round(max(engine_rates), 1)],
            "served_tokens_per_s": round(median(served_rates), 1),
            "served_tokens_per_s_range": [round(min(served_rates), 1), round(max(served_rates), 1)],
            "tokens_per_response": round(median(merged for _, merged in runs), 2),
        },
        output,
    )
