"""FlashInfer's paged attention is timed beside this project's kernels, on the same pages, sustained, on a GPU.

Decode with tensor cores, prefill with FlashAttention-2 and -3, and for a mixed batch POD (decode and prefill in one
kernel) against our one call. FlashInfer (pip install flashinfer-python) compiles each at its first use.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.kernels.cases import (
    CONTEXT,
    DECODES,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    attention,
    normal,
    paged_requests,
)
from benchmarks.kernels.measure import KernelCase, measure_kernel
from nanoflow_backend.bench import result

PAGE = 64
DTYPE = torch.bfloat16
Mix = list[tuple[int, int]]  # (tokens before, tokens in the batch) of each request
PREFILLS: dict[str, Mix] = {
    "8 prompts of 2048": [(0, 2048)] * 8,
    "chunk of 1024 after 7168": [(7168, 1024)],
    "2 prompts of 672": [(0, 672)] * 2,
}
DECODING: Mix = [(CONTEXT - 1, 1)] * DECODES


def flashinfer_package() -> Any:
    """The installed package. Raises: SystemExit, there is none."""
    try:
        return import_module("flashinfer")
    except ImportError:
        raise SystemExit("flashinfer: expected the package flashinfer: pip install flashinfer-python") from None


def layout(mix: Mix) -> tuple[torch.Tensor, ...]:
    """FlashInfer's lists of a batch, on the host: query starts, page starts, pages, tokens in the last page."""
    _, _, table, num_pages = paged_requests(mix, PAGE)
    lengths = [past + new for past, new in mix]
    used = torch.tensor([-(-length // PAGE) for length in lengths])
    pages = torch.cat([row[:count] for row, count in zip(table, used.tolist(), strict=True)])
    starts = torch.nn.functional.pad(torch.tensor([new for _, new in mix]).cumsum(0), (1, 0))
    last = torch.tensor([(length - 1) % PAGE + 1 for length in lengths])
    return starts.int(), torch.nn.functional.pad(used.cumsum(0), (1, 0)).int(), pages.int(), last.int(), num_pages


def workspace() -> torch.Tensor:
    return torch.zeros(512 << 20, dtype=torch.uint8, device="cuda")


def kv_pages(num_pages: int) -> torch.Tensor:
    return normal(num_pages, 2, KV_HEADS, PAGE, HEAD_DIM)


def decode(mix: Mix) -> KernelCase:
    _, page_starts, pages, last, num_pages = layout(mix)
    wrapper = flashinfer_package().BatchDecodeWithPagedKVCacheWrapper(workspace(), "HND", use_tensor_cores=True)
    wrapper.plan(page_starts, pages, last, HEADS, KV_HEADS, HEAD_DIM, PAGE, q_data_type=DTYPE, kv_data_type=DTYPE)
    q, kv = normal(len(mix), HEADS, HEAD_DIM), kv_pages(num_pages)
    out = torch.empty_like(q)
    return KernelCase("FlashInfer decode", lambda i: wrapper.run(q, kv, out=out), *cost(mix))


def prefill(name: str, mix: Mix, backend: str) -> KernelCase:
    starts, page_starts, pages, last, num_pages = layout(mix)
    wrapper = flashinfer_package().BatchPrefillWithPagedKVCacheWrapper(workspace(), "HND", backend=backend)
    wrapper.plan(
        starts, page_starts, pages, last, HEADS, KV_HEADS, HEAD_DIM, PAGE,
        causal=True, q_data_type=DTYPE, kv_data_type=DTYPE,
    )  # fmt: skip
    q, kv = normal(int(starts[-1]), HEADS, HEAD_DIM), kv_pages(num_pages)
    out = torch.empty_like(q)
    return KernelCase(f"FlashInfer {backend} {name}", lambda i: wrapper.run(q, kv, out=out), *cost(mix))


def pod(prompt: tuple[int, int], mix: Mix) -> KernelCase:
    """One chunk of a prompt, contiguous keys, beside decodes."""
    past, new = prompt
    _, page_starts, pages, last, num_pages = layout(mix)
    wrapper = flashinfer_package().PODWithPagedKVCacheWrapper(workspace(), "HND")
    wrapper.plan(
        page_starts.cuda(), pages.cuda(), last.cuda(), HEADS, KV_HEADS, HEAD_DIM, PAGE,
        q_data_type=DTYPE, kv_data_type=DTYPE,
    )  # fmt: skip
    q, k, v = normal(new, HEADS, HEAD_DIM), *(normal(KV_HEADS, past + new, HEAD_DIM) for _ in range(2))
    decodes, kv = normal(len(mix), HEADS, HEAD_DIM), kv_pages(num_pages)

    def call(_: int) -> None:
        wrapper.run(q, k, v, decodes, kv, causal_p=True, kv_layout_p="HND")

    return KernelCase("FlashInfer POD mixed", call, *cost([prompt, *mix]))


def cost(mix: Mix) -> tuple[float, float]:
    """Bytes of keys and values, and flop."""
    pairs = sum(new * past + new * (new + 1) / 2 for past, new in mix)
    kv = sum(past + new for past, new in mix) * KV_HEADS * HEAD_DIM * 4
    return float(kv), 4.0 * pairs * HEADS * HEAD_DIM


def attention_cases() -> Iterator[Any]:
    """Functions that make a case: what one cannot do must not keep the others from running."""
    yield "decode", lambda: decode(DECODING)
    yield "decode", lambda: next(attention("decodes", DECODING, PAGE))
    for name, mix in PREFILLS.items():
        for backend in ("fa3", "fa2"):
            yield name, lambda name=name, mix=mix, backend=backend: prefill(name, mix, backend)
        yield name, lambda name=name, mix=mix: next(attention(name, mix, PAGE))
    prompt = (256, 1024)
    yield "mixed", lambda: pod(prompt, DECODING)
    yield "mixed", lambda: next(attention("mixed", [*DECODING, prompt], PAGE))


def main(
    output: Annotated[Path, typer.Option(help="Where the JSON result goes.")],
    duration_s: Annotated[float, typer.Option(help="Of back-to-back work that is measured, a case.")] = 2.0,
) -> None:
    """FlashInfer's paged attention beside this project's kernels, on the same pages."""
    version = flashinfer_package().__version__
    torch.manual_seed(0)
    results: list[dict[str, Any]] = []
    for work, make in attention_cases():
        try:
            results.append({"work": work, **asdict(measure_kernel(make(), duration_s))})
        except Exception as error:  # a peer's kernel that does not compile or take this shape is a result too
            results.append({"work": work, "error": f"{type(error).__name__}: {error}"[:300]})
        print(results[-1], flush=True)
        result.write({"flashinfer": version, "results": results}, output)
