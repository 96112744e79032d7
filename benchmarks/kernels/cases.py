"""These kernels are timed, with operands of the sizes of Llama-3-8B (and of Mixtral-8x7B's experts)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from nanoflow_kernels import device as kernels
from torch import Tensor

from benchmarks.kernels.measure import SETS, KernelCase

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCABULARY = 4096, 32, 8, 128, 14336, 128_256
TOKENS, DECODES, CONTEXT, CHUNK_START = 2048, 704, 1280, 256
PARTITIONS = (28, 32, 36, 40)  # SMs that decode attention may have of its own
DTYPE, BYTES = torch.bfloat16, 2


def normal(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def empty(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.empty(shape, device="cuda", dtype=dtype)


def row_kernels() -> Iterator[KernelCase]:
    x, y, z, w = ([normal(TOKENS, HIDDEN) for _ in range(SETS)] for _ in range(4))
    weight, row = normal(HIDDEN), TOKENS * HIDDEN * BYTES
    yield KernelCase(
        "add_rms_norm", lambda i: kernels.add_rms_norm(x[i], y[i], weight, eps=1e-5, out=(z[i], w[i])), 4 * row
    )
    table, ids = normal(VOCABULARY, HIDDEN), torch.randint(VOCABULARY, (SETS, TOKENS), device="cuda").int()
    yield KernelCase("embed", lambda i: kernels.embed(ids[i], table, out=(z[i], w[i])), 3 * row)


def products() -> Iterator[KernelCase]:
    shapes = {
        "qkv": (TOKENS, (HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
        "o": (TOKENS, HIDDEN, HIDDEN),
        "down": (TOKENS, HIDDEN, INNER),
        "head": (DECODES, VOCABULARY, HIDDEN),
    }
    for name, (rows, out, inner) in shapes.items():
        x, weight = normal(rows, inner), [normal(out, inner) * 0.02 for _ in range(SETS)]
        y = empty(rows, out, dtype=torch.float32 if name == "head" else DTYPE)
        moved = (rows * inner + out * inner) * BYTES + y.numel() * y.element_size()
        yield KernelCase(
            f"linear {name} [{rows}, {inner}] -> {out}",
            lambda i, x=x, weight=weight, y=y: kernels.linear(x, weight[i], out=y),
            moved,
            2.0 * rows * out * inner,
        )
    weight = [normal(2 * INNER, HIDDEN) * 0.02 for _ in range(SETS)]
    for rows in (16, 256, 640, 704, 1024, TOKENS):  # gate and up, the product alone and with SwiGLU
        x, y, h = normal(rows, HIDDEN), empty(rows, 2 * INNER), empty(rows, INNER)
        for name, call, product in (
            ("linear", lambda i, x=x, y=y: kernels.linear(x, weight[i], out=y), y),
            ("linear_swiglu", lambda i, x=x, h=h: kernels.linear_swiglu(x, weight[i], out=h), h),
        ):
            moved = (x.numel() + weight[0].numel() + product.numel()) * BYTES
            shape, flop = f"[{rows}, {HIDDEN}] -> {2 * INNER}", 4.0 * rows * INNER * HIDDEN
            yield KernelCase(f"{name} gate_up {shape}", call, moved, flop)


def paged_requests(mix: list[tuple[int, int]], page_tokens: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """positions, slots and page table of requests of (tokens before, tokens in the batch); pages lie anywhere."""
    used = [-(-(past + new) // page_tokens) for past, new in mix]
    pages = torch.randperm(sum(used)).int().split(used)
    table = torch.nn.utils.rnn.pad_sequence(list(pages), batch_first=True)
    positions = torch.cat([torch.arange(past, past + new) for past, new in mix]).int()
    slots = torch.repeat_interleave(torch.arange(len(mix)), torch.tensor([new for _, new in mix])).int()
    return positions.cuda(), slots.cuda(), table.cuda(), sum(used)


def attention(name: str, mix: list[tuple[int, int]], page_tokens: int, sms: int | None = None) -> Iterator[KernelCase]:
    positions, slots, table, num_pages = paged_requests(mix, page_tokens)
    kept = max(1, min(SETS, int(60e9 / (num_pages * page_tokens * KV_HEADS * HEAD_DIM * 4))))
    pages = [normal(num_pages, 2, KV_HEADS, page_tokens, HEAD_DIM) for _ in range(kept)]
    q, out = normal(len(positions), HEADS * HEAD_DIM), empty(len(positions), HEADS * HEAD_DIM)
    plan = kernels.plan_attention(positions, slots, pages[0], HEADS, num_sms=sms)
    kv = sum(past + new for past, new in mix) * KV_HEADS * HEAD_DIM * 2 * BYTES
    pairs = sum(new * past + new * (new + 1) / 2 for past, new in mix)
    yield KernelCase(
        f"attention {name} page {page_tokens}" + (f" on {sms} SMs" if sms else ""),
        lambda i: kernels.attention(q, pages[i % kept], positions, slots, table, out=out, num_sms=sms, plan=plan),
        kv + 2 * q.numel() * BYTES,
        4.0 * pairs * HEADS * HEAD_DIM,
        sms,
    )
    if name == "mixed":
        yield KernelCase(
            "plan_attention",
            lambda i: kernels.plan_attention(positions, slots, pages[0], HEADS),
            2 * 4.0 * len(positions),
        )
        qkv = [normal(len(positions), (HEADS + 2 * KV_HEADS) * HEAD_DIM) for _ in range(SETS)]
        frequencies = torch.rand(HEAD_DIM // 2, device="cuda")
        yield KernelCase(
            "rope_append",
            lambda i: kernels.rope_append(qkv[i], positions, slots, table, frequencies, out=(q, pages[i % kept])),
            2 * qkv[0].numel() * BYTES,
        )


def attentions() -> Iterator[KernelCase]:
    decodes = [(CONTEXT - 1, 1)] * DECODES
    for page_tokens in (16, 128):
        yield from attention("704 decodes of 1280", decodes, page_tokens)
    for count, context in ((DECODES, CONTEXT), (1500, 300), (64, 8192)):
        for sms in (None, *PARTITIONS):
            yield from attention(f"{count} decodes of {context}", [(context - 1, 1)] * count, 64, sms)
    uneven = [(80 + 2400 * i // DECODES, 1) for i in range(DECODES)]
    yield from attention("704 decodes of 80 to 2480", uneven, 64)
    yield from attention("1 decode of 32768", [(32767, 1)], 64)
    for page_tokens in (64, 128):
        yield from attention("8 prompts of 2048", [(0, 2048)] * 8, page_tokens)
    yield from attention("chunk of 1024 after 7168", [(7168, 1024)], 64)
    yield from attention("mixed", [*decodes, (CHUNK_START, 1024), (0, TOKENS - DECODES - 1024)], 64)


def experts() -> Iterator[KernelCase]:
    count, chosen = 8, 2
    logits = normal(TOKENS, count, dtype=torch.float32)
    ids, weights = empty(TOKENS, chosen, dtype=torch.int32), empty(TOKENS, chosen, dtype=torch.float32)
    yield KernelCase("route", lambda i: kernels.route(logits, out=(ids, weights)), TOKENS * (count + 2 * chosen) * 4)
    x, gate_up = normal(TOKENS, HIDDEN), [normal(count, 2 * INNER, HIDDEN) * 0.02 for _ in range(2)]
    h, down = normal(TOKENS, chosen * INNER), [normal(count, HIDDEN, INNER) * 0.02 for _ in range(2)]
    out = empty(TOKENS, HIDDEN)
    flop = 2.0 * TOKENS * chosen * HIDDEN * INNER
    kernels.route(logits, out=(ids, weights))
    yield KernelCase(
        "grouped_linear_swiglu",
        lambda i: kernels.grouped_linear_swiglu(x, ids, gate_up[i % 2], out=h),
        (gate_up[0].numel() + x.numel() + h.numel()) * BYTES,
        2 * flop,
    )
    yield KernelCase(
        "grouped_combine",
        lambda i: kernels.grouped_combine(h, ids, weights, down[i % 2], out=out),
        (down[0].numel() + h.numel() + out.numel()) * BYTES,
        flop,
    )


def samples() -> Iterator[KernelCase]:
    logits = [normal(DECODES, VOCABULARY, dtype=torch.float32) * 3 for _ in range(2)]
    seed, position = torch.arange(2 * DECODES, device="cuda").view(2, -1)
    ways = {
        "greedy": (0, 0, 1, 0),
        "plain": (1, 0, 1, 0),
        "top_k 50": (1, 50, 1, 0),
        "top_k 50, top_p 0.9": (0.8, 50, 0.9, 0),
        "min_p 0.05": (1, 0, 1, 0.05),
    }
    for name, (temperature, top_k, top_p, min_p) in ways.items():
        columns = (
            torch.full((DECODES,), temperature, device="cuda", dtype=torch.float64),
            torch.full((DECODES,), top_k, device="cuda", dtype=torch.int64),
            torch.full((DECODES,), top_p, device="cuda", dtype=torch.float64),
            torch.full((DECODES,), min_p, device="cuda", dtype=torch.float64),
        )
        yield KernelCase(
            f"sample {name}",
            lambda i, columns=columns: kernels.sample(logits[i % 2], *columns, seed, position),
            logits[0].numel() * 4,
        )
