"""Our engine and vLLM run the same workloads on one card, one after the other; one result has both and their ratio.

Each runs in a process of its own. Nothing is fetched: vLLM may lie unpacked in a folder (`--vllm-path`), and this
project beside it (run it from the project's root, with PYTHONPATH=.:kernels where it is not installed).
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.peers.vllm import MAX_MODEL_TOKENS
from nanoflow_backend.bench import result
from nanoflow_backend.bench.workload import WorkloadSpec
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.offline.output import check_output

FIGURES = ("total_tokens_per_s", "output_tokens_per_s", "wall_s", "mean_power_w", "mj_per_token", "share_of_eq5")
FACTS = ("schedule", "quantization", "kv_cache_dtype", "settings", "versions")
FP8 = {  # what each engine calls it
    "nanoflow": ("--set", "quantization=fp8", "--set", "kv_cache_dtype=fp8_e4m3"),
    "vllm": ("--quantization", "fp8", "--kv-cache-dtype", "fp8"),
}
HAS_VLLM = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"


def main(
    model: Annotated[Path, typer.Option(help="Hugging Face folder; only its config.json is read.")],
    workload: Annotated[list[str], typer.Option(help="As of `nanoflow bench offline`; repeatable.")],
    output: Annotated[Path, typer.Option(help="The JSON result; each engine's own lies beside it.")],
    fp8: Annotated[bool, typer.Option(help="Weights, activations and KV pages in FP8, in both engines.")] = False,
    settings: Annotated[list[str] | None, typer.Option("--set", help="A field of our engine.json. Repeatable.")] = None,
    max_num_seqs: Annotated[
        list[int] | None, typer.Option(help="vLLM's; of several, each in a start of its own, its best counts.")
    ] = None,
    max_num_batched_tokens: Annotated[list[int] | None, typer.Option(help="vLLM's, likewise.")] = None,
    gpu_memory_utilization: Annotated[float, typer.Option(help="Of both engines.")] = 0.94,
    vllm_path: Annotated[Path | None, typer.Option(help="Folder of the package vllm, if it is not installed.")] = None,
    vllm_python: Annotated[str, typer.Option(help="Interpreter that vLLM runs in.")] = sys.executable,
) -> None:
    """Our engine, then vLLM, on the same workloads, prompts and distribution of weights; and how they compare."""
    for text in workload:
        WorkloadSpec.parse(text)
    tokens = min(MAX_MODEL_TOKENS, read_model_config(model).max_model_tokens)
    check_output(output)
    path = [str(vllm_path.resolve())] if vllm_path else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")])}
    if subprocess.run([vllm_python, "-c", HAS_VLLM], env=environment).returncode:
        raise ConfigError(f"{vllm_python}: expected vLLM in this interpreter or in --vllm-path, found none")
    common = ("--model", str(model), *(word for text in workload for word in ("--workload", text)))
    ours = _run(
        [
            *(sys.executable, "-m", "nanoflow_backend", "bench", "offline", *common),
            *("--set", "load_format=dummy", "--set", f"max_model_tokens={tokens}"),
            *("--set", f"gpu_memory_utilization={gpu_memory_utilization}", *(FP8["nanoflow"] if fp8 else ())),
            *(word for setting in settings or [] for word in ("--set", setting)),
        ],
        output.with_suffix(".nanoflow.json"),
    )
    theirs = [
        _run(
            [
                *(vllm_python, "-m", "benchmarks", "vllm", *common, *(FP8["vllm"] if fp8 else ())),
                *("--max-num-seqs", str(seqs), "--max-num-batched-tokens", str(batched)),
                *("--gpu-memory-utilization", str(gpu_memory_utilization)),
            ],
            output.with_suffix(f".vllm-{seqs}-{batched}.json"),
            environment,
        )
        for seqs, batched in itertools.product(max_num_seqs or [1024], max_num_batched_tokens or [8192])
    ]
    found = compare(ours, theirs)
    result.write({"model": model.name, **found}, output)
    for row in found["rows"]:
        print(tell(row))


def compare(ours: Mapping[str, Any], theirs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A row for each workload: both engines' figures, vLLM's with the settings that served it best, and our rate over
    its rate."""
    rows = []
    for number, run in enumerate(_runs(ours)):
        peers = [(_runs(each)[number], each["settings"]) for each in theirs]
        peer, settings = max(peers, key=lambda found: found[0]["total_tokens_per_s"])
        rows.append(
            {
                **{name: run[name] for name in ("workload", "requests", "input_tokens", "output_tokens")},
                "ratio": round(run["total_tokens_per_s"] / peer["total_tokens_per_s"], 4),
                "nanoflow": _figures(run),
                "vllm": {
                    **_figures(peer),
                    **{name: settings[name] for name in ("max_num_seqs", "max_num_batched_tokens")},
                },
            }
        )
    return {
        **({"device": ours["device"]} if "device" in ours else {}),
        "nanoflow": _facts(ours),
        "vllm": [_facts(each) for each in theirs],
        "rows": rows,
    }


def tell(row: Mapping[str, Any]) -> str:
    """One line of what `compare` found."""

    def told(name: str) -> str:
        found = row[name]
        power = f" at {found['mean_power_w']:.0f} W, {found['mj_per_token']:.1f} mJ" if "mean_power_w" in found else ""
        return f"{name} {found['total_tokens_per_s']:,.0f} tokens/s{power}"

    return f"{row['workload']}, {row['requests']:,} requests: {told('nanoflow')}; {told('vllm')}; {row['ratio']:.3f}x"


def _runs(measured: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """A result of one workload is its own only run."""
    runs: Sequence[Mapping[str, Any]] = measured.get("runs", [measured])
    return runs


def _figures(run: Mapping[str, Any]) -> dict[str, Any]:
    return {name: run[name] for name in FIGURES if name in run}


def _facts(measured: Mapping[str, Any]) -> dict[str, Any]:
    return {name: measured[name] for name in FACTS if name in measured}


def _run(command: list[str], output: Path, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Raises: ConfigError, it failed; what it said is on the standard error."""
    print(f"{output.name} ...", file=sys.stderr, flush=True)
    done = subprocess.run([*command, "--output", str(output)], env=environment, stdout=sys.stderr)
    if done.returncode:
        raise ConfigError(f"{' '.join(command[1:4])} ended with status {done.returncode}; see above")
    found: dict[str, Any] = json.loads(output.read_text())
    return found
