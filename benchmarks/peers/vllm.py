"""The offline benchmark runs on vLLM: requests, prompts and distribution of weights are those of our own.

It needs vLLM in this interpreter (`pip install vllm`, in an environment of its own: it pins torch; 0.26 is the newest
for torch 2.11), and of this project only msgspec, typer and PYTHONPATH=.:kernels. vLLM's own dummy weights are uniform
in ±1e-3, with which a GPU draws less power and runs 5-6 % faster; here they are N(0, 0.02) and norms 1, as in our
engine.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from nanoflow_backend.bench import result, workload
from nanoflow_backend.bench.workload import Dataset
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.runtime.gpu_meter import find_gpu_meter

# Before vLLM is imported. A function goes to its workers (the weights); NVLink multicast stays off on shared hosts.
ENVIRONMENT = {
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "HF_HUB_OFFLINE": "1",
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
}
MAX_MODEL_TOKENS = 8192
WARM_UP = workload.constant(512, 32, 64)


def main(
    model: Annotated[Path, typer.Option(help="Hugging Face folder; only its config.json is read.")],
    output: Annotated[Path | None, typer.Option(help="Where the JSON result goes.")] = None,
    input_tokens: int = 1024,
    output_tokens: int = 512,
    requests: int = 1500,
    trace: Annotated[Path | None, typer.Option(help="CSV with ContextTokens and GeneratedTokens instead.")] = None,
    dataset: Annotated[Dataset | None, typer.Option(help="Lengths drawn as in this dataset instead.")] = None,
    max_num_batched_tokens: int = 8192,
    max_num_seqs: int = 1024,
    tensor_parallel_size: int = 1,
    gpu_memory_utilization: float = 0.94,
) -> None:
    """The workload of `nanoflow bench offline` on vLLM: its requests, prompts and distribution of weights."""
    os.environ.update(ENVIRONMENT)
    try:
        from vllm import LLM
    except ImportError as missing:
        raise SystemExit(
            f"vLLM cannot be imported ({missing}): pip install vllm, in an environment of its own, and run this with "
            "that environment's Python and PYTHONPATH=.:kernels"
        ) from None
    if trace:
        work = workload.of_trace(trace, requests, MAX_MODEL_TOKENS)
    elif dataset:
        work = workload.drawn(dataset, requests, MAX_MODEL_TOKENS)
    else:
        work = workload.constant(input_tokens, output_tokens, requests)
    settings = {
        "load_format": "dummy",
        "dtype": "bfloat16",
        "max_model_len": MAX_MODEL_TOKENS,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "gpu_memory_utilization": gpu_memory_utilization,
        "enable_prefix_caching": False,
        "tensor_parallel_size": tensor_parallel_size,
    }
    llm = LLM(model=str(model), skip_tokenizer_init=True, **settings)
    deviations = llm.apply_model(draw_weights)
    vocab_size = read_model_config(model).vocab_size
    generate_all(llm, WARM_UP, vocab_size)
    measured = generate_all(llm, work, vocab_size)
    result.write(
        {
            "workload": work.name,
            **work.facts,
            "model": model.name,
            "engine": "vllm",
            "schedule": "vllm",
            "settings": settings,
            "weights": {"drawn": "N(0, 0.02), norms 1", "deviation_of_each_rank": deviations},
            "requests": len(work.lengths),
            "input_tokens": work.input_tokens,
            "output_tokens": work.output_tokens,
            **measured,
        },
        output,
    )


def draw_weights(model: Any) -> float:
    """As nanoflow_backend.models.weights.dummy does. Returns the deviation found in all that is no norm."""
    import torch

    squares = elements = 0.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1)
            else:
                parameter.normal_(0, 0.02)
                squares += float(parameter.float().square().sum())
                elements += parameter.numel()
    return round((squares / elements) ** 0.5, 6)


def generate_all(llm: Any, work: workload.Workload, vocab_size: int) -> dict[str, Any]:
    """All requests queued at once; greedy, of fixed lengths, ids in and ids out."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": prompt} for prompt in work.prompts(vocab_size)]
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
