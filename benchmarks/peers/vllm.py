"""The offline benchmark runs on vLLM: requests, prompts and distribution of weights are those of our own.

It needs vLLM in this interpreter (`pip install vllm`, in an environment of its own: it pins torch; 0.26 is the newest
for torch 2.11), and of this project only msgspec, typer and PYTHONPATH=.:kernels. vLLM's own dummy weights are uniform
in ±1e-3, with which a GPU draws less power and runs 5-6 % faster; here they are N(0, 0.02) and norms 1, as in our
engine, in FP8 too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from nanoflow_backend.bench import result
from nanoflow_backend.bench.workload import SEED, Dataset, Workload, asked_for, constant
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.offline.output import check_output
from nanoflow_backend.runtime.gpu_meter import find_gpu_meter

# Before vLLM is imported. A function goes to its workers (the weights); collectives do without NVLink multicast.
ENVIRONMENT = {
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "HF_HUB_OFFLINE": "1",
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
}
MAX_MODEL_TOKENS = 8192  # of one request, where the model has as many positions
WARM_UP = constant(512, 32, 64)
DEVIATION = 0.02  # of weights
SETTINGS = {"load_format": "dummy", "dtype": "bfloat16", "enable_prefix_caching": False}  # in every run


def main(
    model: Annotated[Path, typer.Option(help="Hugging Face folder; only its config.json is read.")],
    output: Annotated[Path | None, typer.Option(help="Where the JSON result goes.")] = None,
    input_tokens: int = 1024,
    output_tokens: int = 512,
    requests: int = 1500,
    trace: Annotated[Path | None, typer.Option(help="CSV with ContextTokens and GeneratedTokens instead.")] = None,
    dataset: Annotated[Dataset | None, typer.Option(help="Lengths drawn as in this dataset instead.")] = None,
    workload: Annotated[
        list[str] | None, typer.Option(help="As of `nanoflow bench offline`; repeatable: one after the other.")
    ] = None,
    quantization: Annotated[str | None, typer.Option(help="As vLLM names it: fp8.")] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="As vLLM names it: auto, fp8.")] = "auto",
    max_num_batched_tokens: int = 8192,
    max_num_seqs: int = 1024,
    tensor_parallel_size: int = 1,
    gpu_memory_utilization: float = 0.94,
) -> None:
    """Workloads of `nanoflow bench offline` on vLLM: their requests, prompts and distribution of weights."""
    specs = asked_for(workload or [], trace, dataset, (input_tokens, output_tokens), requests)
    shape = read_model_config(model)
    max_model_tokens, vocab_size = min(MAX_MODEL_TOKENS, shape.max_model_tokens), shape.vocab_size
    works = [spec.read(max_model_tokens) for spec in specs]
    if output:
        check_output(output)
    os.environ.update(ENVIRONMENT)
    try:
        from vllm import LLM
    except ImportError as missing:
        raise not_installed(missing) from None
    settings = SETTINGS | {
        "quantization": quantization,
        "kv_cache_dtype": kv_cache_dtype,
        "max_model_len": max_model_tokens,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "gpu_memory_utilization": gpu_memory_utilization,
        "tensor_parallel_size": tensor_parallel_size,
    }
    llm = LLM(model=str(model), skip_tokenizer_init=True, **settings)
    deviations = llm.apply_model(draw_weights)
    generate_all(llm, WARM_UP, vocab_size)
    runs = [
        {
            "workload": work.name,
            **work.facts,
            "requests": len(work.lengths),
            "input_tokens": work.input_tokens,
            "output_tokens": work.output_tokens,
            **generate_all(llm, work, vocab_size, seed),
        }
        for seed, work in enumerate(works)
    ]
    facts = engine_facts(model, settings, deviations)
    result.write(facts | (runs[0] if len(runs) == 1 else {"runs": runs}), output)


def not_installed(missing: ImportError) -> SystemExit:
    """What to say where there is no vLLM."""
    return SystemExit(
        f"vLLM cannot be imported ({missing}): pip install vllm, in an environment of its own, and run this with that "
        "environment's Python and PYTHONPATH=.:kernels"
    )


def engine_facts(model: Path, settings: Mapping[str, Any], deviations: Sequence[float]) -> dict[str, Any]:
    """What a result says of the engine. `deviations`: of the weights of each rank."""
    return {
        "model": model.name,
        "engine": "vllm",
        "schedule": "vllm",
        "quantization": settings["quantization"],
        "kv_cache_dtype": settings["kv_cache_dtype"],
        "settings": settings,
        "weights": {"drawn": "N(0, 0.02), norms 1", "deviation_of_each_rank": deviations},
    }


def draw_weights(model: Any) -> float:
    """As nanoflow_backend.models.weights.dummy does. Returns the deviation found in all that is no norm and no scale.

    A weight in e4m3 gets the values of a quantised one, and its scales what makes it N(0, 0.02).

    Raises:
        ConfigError: a parameter of a dtype that says nothing about its values, such as packed ints.
    """
    import torch

    from nanoflow_backend.models.random_values import FP8_DEVIATION, fill_normal, parts

    squares = elements = 0.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_fp8 = parameter.dtype is torch.float8_e4m3fn
            if not parameter.is_floating_point():
                raise ConfigError(f"vLLM's {name}: expected a floating dtype, got {parameter.dtype}")
            if "norm" in name:
                parameter.fill_(1)
            elif "weight_scale" in name:
                parameter.fill_(DEVIATION / FP8_DEVIATION)
            elif parameter.ndim:
                fill_normal(parameter.data, None if is_fp8 else DEVIATION)
                scale = DEVIATION / FP8_DEVIATION if is_fp8 else 1.0
                squares += sum(float((part.float() * scale).square().sum()) for part in parts(parameter.data))
                elements += parameter.numel()
    return round((squares / elements) ** 0.5, 6)


def generate_all(llm: Any, work: Workload, vocab_size: int, seed: int = SEED) -> dict[str, Any]:
    """All requests queued at once; greedy, of fixed lengths, ids in and ids out."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": prompt} for prompt in work.prompts(vocab_size, seed)]
    params = [
        SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=False)
        for _, length in work.lengths
    ]
    meter = find_gpu_meter()
    before, start_s = meter.read() if meter else None, time.perf_counter()
    completions = llm.generate(prompts, params, use_tqdm=False)
    wall_s, after = time.perf_counter() - start_s, meter.read() if meter else None
    outputs = sum(len(completion.outputs[0].token_ids) for completion in completions)
    assert outputs == work.output_tokens, f"{outputs} output tokens, expected {work.output_tokens}"
    total = work.input_tokens + outputs
    found: dict[str, Any] = {
        "wall_s": round(wall_s, 3),
        "total_tokens_per_s": round(total / wall_s, 1),
        "output_tokens_per_s": round(outputs / wall_s, 1),
    }
    if meter and before and after:  # of the first GPU
        energy_j = after.energy_j - before.energy_j
        found["device"] = meter.name
        found["mean_power_w"] = round(energy_j / (after.time_s - before.time_s), 1)
        found["mj_per_token"] = round(1e3 * energy_j / total, 3)
    return found
