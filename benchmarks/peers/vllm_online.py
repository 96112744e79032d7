"""The open loop of `nanoflow bench online --rate` runs on vLLM: arrivals, lengths, prompts and figures are our own.

vLLM is its AsyncLLM: requests go in and tokens come out in this process, the engine has one of its own. What this needs
beside vLLM, and why weights are drawn, is in vllm.py.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import time
import uuid
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from benchmarks.peers.vllm import (
    ENVIRONMENT,
    MAX_MODEL_TOKENS,
    SETTINGS,
    draw_weights,
    engine_facts,
    not_installed,
)
from nanoflow_backend.bench import result
from nanoflow_backend.bench.online.arrivals import Kind, Load
from nanoflow_backend.bench.online.latency import Limits
from nanoflow_backend.bench.online.open_loop import News, measure_rates, what_came
from nanoflow_backend.bench.workload import Dataset, asked_for
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.offline.output import check_output

T = TypeVar("T")


def main(
    model: Annotated[Path, typer.Option(help="Hugging Face folder; only its config.json is read.")],
    output: Annotated[Path | None, typer.Option(help="Where the JSON result goes.")] = None,
    rate: Annotated[list[float] | None, typer.Option(help="Requests a second; repeatable.")] = None,
    duration: Annotated[float, typer.Option(help="Seconds of measured arrivals.")] = 60.0,
    warm_up: Annotated[float, typer.Option(help="Seconds of others before and after.")] = 10.0,
    input_tokens: int = 1024,
    output_tokens: int = 512,
    trace: Annotated[Path | None, typer.Option(help="CSV with ContextTokens and GeneratedTokens instead.")] = None,
    dataset: Annotated[Dataset | None, typer.Option(help="Lengths drawn as in this dataset instead.")] = None,
    arrivals: Annotated[Kind, typer.Option(help="Drawn, or the trace's, stretched to each rate.")] = "poisson",
    ttft_limit: Annotated[float | None, typer.Option(help="Goodput: ms to a request's first token.")] = None,
    itl_limit: Annotated[float | None, typer.Option(help="Goodput: ms between its tokens, the mean.")] = None,
    seed: Annotated[int, typer.Option(help="Of arrivals and prompts.")] = 0,
    quantization: Annotated[str | None, typer.Option(help="As vLLM names it: fp8.")] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="As vLLM names it: auto, fp8.")] = "auto",
    max_num_batched_tokens: int = 8192,
    max_num_seqs: int = 1024,
    tensor_parallel_size: int = 1,
    gpu_memory_utilization: float = 0.94,
) -> None:
    """The open loop of `nanoflow bench online` on vLLM: its arrivals, prompts and distribution of weights."""
    (spec,) = asked_for([], trace, dataset, (input_tokens, output_tokens), 1)
    load = Load(tuple(rate or ()), warm_up, duration, spec.source, arrivals, seed)
    load.check()
    limits, shape = Limits(ttft_limit, itl_limit), read_model_config(model)
    max_model_tokens = min(MAX_MODEL_TOKENS, shape.max_model_tokens)
    if output:
        check_output(output)
    settings = SETTINGS | {
        "quantization": quantization,
        "kv_cache_dtype": kv_cache_dtype,
        "max_model_len": max_model_tokens,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "gpu_memory_utilization": gpu_memory_utilization,
        "tensor_parallel_size": tensor_parallel_size,
    }
    target = VllmTarget({"model": str(model), **settings})
    deviations = target.draw_weights()
    measured = measure_rates(
        target, load, limits, vocab_size=shape.vocab_size, max_model_tokens=max_model_tokens, tell=print
    )
    target.close()
    result.write(engine_facts(model, settings, deviations) | measured, output)


class VllmTarget:
    """A Target (nanoflow_backend.bench.online.open_loop): an AsyncLLM, whose event loop runs on a thread of its own."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        """`arguments`: of vLLM's AsyncEngineArgs. Exits, saying what to install, where there is no vLLM."""
        os.environ.update(ENVIRONMENT)
        try:
            from vllm import SamplingParams
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.sampling_params import RequestOutputKind
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as missing:
            raise not_installed(missing) from None
        self._params = lambda tokens: SamplingParams(
            temperature=0.0,
            max_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._running: set[asyncio.Task[None]] = set()
        self._came: queue.SimpleQueue[News] = queue.SimpleQueue()

        async def start() -> Any:
            options = {"skip_tokenizer_init": True, "disable_log_stats": True, **arguments}
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**options))

        self._engine = self._wait(start())

    def draw_weights(self) -> list[float]:
        """As in our engine. Returns the deviation that each rank found."""
        deviations: list[float] = self._wait(self._engine.collective_rpc("apply_model", args=(draw_weights,)))
        return deviations

    def send(self, request: int, prompt: list[int], output_tokens: int) -> None:
        self._loop.call_soon_threadsafe(self._begin, request, prompt, output_tokens)

    def receive(self, until_s: float) -> list[News]:
        return what_came(self._came, None if until_s == float("inf") else until_s - time.perf_counter())

    def stop(self) -> None:
        self._wait(self._cancel_all())
        self._came = queue.SimpleQueue()

    def close(self) -> None:
        """End the engine's process. Nothing may follow."""
        self._engine.shutdown()
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _begin(self, request: int, prompt: list[int], output_tokens: int) -> None:
        task = self._loop.create_task(self._generate(request, prompt, output_tokens))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _generate(self, request: int, prompt: list[int], output_tokens: int) -> None:
        came, ids = self._came, {"prompt_token_ids": prompt}
        try:
            async for output in self._engine.generate(ids, self._params(output_tokens), uuid.uuid4().hex):
                tokens = len(output.outputs[0].token_ids)
                came.put(News(request, time.perf_counter(), tokens, output.finished))
        except Exception as error:  # of vLLM, whose own exceptions differ by version
            came.put(News(request, time.perf_counter(), 0, ended=True, failed=f"{type(error).__name__}: {error}"))

    async def _cancel_all(self) -> None:
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
