"""Every reference kernel against formulas written out in float64, or against transformers' modules.

Sizes are prime where they can be, and T = 0 and T = 1 are among them. Operands are the left columns of wider, NaN
filled buffers, as they are in a program.
"""

from __future__ import annotations

import math
import time

import pytest
import torch
from nanoflow_kernels import reference
from support.comparison import assert_close
from torch import Tensor

from benchmarks.models.checkpoints import make

TOKENS = (0, 1, 2, 13)
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(params=TOLERANCE, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def strided(tensor: Tensor) -> Tensor:
    """The same rows, in the first columns of a wider buffer whose other columns are poison."""
    wide = torch.full((tensor.shape[0], tensor.shape[1] + 5), torch.nan, dtype=tensor.dtype)
    wide[:, : tensor.shape[1]] = tensor
    return wide[:, : tensor.shape[1]]


def empty(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    fill = 77 if dtype == torch.int32 else torch.nan
    return torch.full((rows, columns + 3), fill, dtype=dtype)[:, :columns]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    tensor = torch.randn(shape).to(dtype)
    return strided(tensor) if len(shape) == 2 else tensor


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("tokens", TOKENS)
def test_embed_is_a_zero_residual_and_the_rows_of_the_table(tokens: int, dtype: torch.dtype) -> None:
    table, ids = random(11, 7, dtype=dtype), torch.randint(11, (tokens,), dtype=torch.int32)
    residual, update = empty(tokens, 7, dtype), empty(tokens, 7, dtype)
    reference.embed(ids, table, out=(residual, update))
    assert torch.equal(residual, torch.zeros(tokens, 7, dtype=dtype))
    assert torch.equal(update, torch.stack([table[i] for i in ids.tolist()]) if tokens else update)


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("tokens", [1, 10, 13])
def test_timed_exchange_adds_blocks_up_or_repeats_them(tokens: int, ranks: int, dtype: torch.dtype) -> None:
    mine = -(-tokens // ranks)
    whole, part = random(tokens, 6 * ranks, dtype=dtype), random(mine, 6 * ranks, dtype=dtype)
    below = torch.zeros(mine * ranks, 6 * ranks, dtype=torch.float64)
    below[:tokens] = whole.double()
    for x, expected in (
        (whole, whole.double()),
        (whole, below.view(ranks, mine, -1).sum(0)),
        (whole, whole.double().view(tokens, ranks, 6).sum(1)),
        (part, part.double().repeat(ranks, 1)[:tokens]),
        (whole[:, :6], whole[:, :6].double().repeat(1, ranks)),
    ):
        out = empty(*expected.shape, dtype)
        reference.timed_exchange(x, out=out, scale=1.5, us=0.0)
        assert_close("exchanged", out, 1.5 * expected, TOLERANCE[dtype])


def test_timed_exchange_takes_its_time() -> None:
    x, out, begin_s = random(3, 4), empty(3, 4, torch.float32), time.perf_counter()
    reference.timed_exchange(x, out=out, scale=1.0, us=2e4)
    assert time.perf_counter() - begin_s >= 0.02


@pytest.mark.parametrize("tokens", TOKENS)
def test_add_rms_norm(tokens: int, dtype: torch.dtype) -> None:
    residual, update, weight = random(tokens, 31, dtype=dtype), random(tokens, 31, dtype=dtype), random(31, dtype=dtype)
    kept, normed = empty(tokens, 31, dtype), empty(tokens, 31, dtype)
    reference.add_rms_norm(residual, update, weight, eps=1e-5, out=(kept, normed))
    s = (residual.double() + update.double()).to(dtype).double()
    assert_close("residual", kept, residual.double() + update.double(), TOLERANCE[dtype])
    expected = s / ((s**2).sum(-1, keepdim=True) / 31 + 1e-5).sqrt() * weight.double()
    assert_close("norm", normed, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("wide_output", [False, True])
def test_linear(tokens: int, bias: bool, wide_output: bool, dtype: torch.dtype) -> None:
    x, weight = random(tokens, 13, dtype=dtype), random(17, 13, dtype=dtype)
    b = random(17, dtype=dtype) if bias else None
    out = empty(tokens, 17, torch.float32 if wide_output else dtype)
    reference.linear(x, weight, *([b] if bias else []), out=out)
    expected = torch.einsum("ti,oi->to", x.double(), weight.double()) + (b.double() if bias else 0)
    assert_close("linear", out, expected, 1e-6 if wide_output else TOLERANCE[dtype])


@pytest.mark.parametrize("tokens", TOKENS)
def test_linear_swiglu(tokens: int, dtype: torch.dtype) -> None:
    x, weight, out = random(tokens, 13, dtype=dtype), random(10, 13, dtype=dtype), empty(tokens, 5, dtype)
    reference.linear_swiglu(x, weight, out=out)
    assert_close("linear_swiglu", out, gated(torch.einsum("ti,oi->to", x.double(), weight.double())), TOLERANCE[dtype])


def gated(pairs: Tensor) -> Tensor:
    gate, up = pairs[..., 0::2], pairs[..., 1::2]
    return gate / (1 + (-gate).exp()) * up


# rope and attention: requests of a batch, each with `past` tokens in its pages and `new` ones in this nano-batch

MIXES = {
    "one decode at position 0": [(0, 1)],
    "decodes of very different lengths": [(0, 1), (1, 1), (2, 1), (40, 1), (15, 1), (16, 1)],
    "a whole prompt": [(0, 19)],
    "chunks and decodes": [(7, 1), (31, 1), (0, 5), (12, 5), (3, 11)],
    "more decodes than are gathered at a time": [(38 + i % 3, 1) for i in range(80)],
    "nothing": [],
}


def paged_batch(mix: list[tuple[int, int]], page_tokens: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """positions [T], slots [T], page_table [S, N] with entries that are not set, and the number of pages."""
    num_slots, columns = len(mix) + 2, 64
    order = torch.randperm(num_slots)  # requests sit in any slots, and their pages are anywhere
    pages = iter(torch.randperm(4000).tolist())
    table = torch.full((num_slots, columns), -1, dtype=torch.int32)
    positions, slots = [], []
    for slot, (past, new) in zip(order.tolist(), mix, strict=False):
        positions += range(past, past + new)
        slots += [slot] * new
        for index in range(-(-(past + new) // page_tokens)):
            table[slot, index] = next(pages)
    return torch.tensor(positions, dtype=torch.int32), torch.tensor(slots, dtype=torch.int32), table, 4000


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(3, 3, 2), (8, 2, 16), (5, 1, 6)])
@pytest.mark.parametrize(("page_tokens", "window"), [(1, 0), (7, 5), (16, 0)])
def test_attention_over_poisoned_pages(
    mix: str, heads: int, kv_heads: int, head_dim: int, page_tokens: int, window: int, dtype: torch.dtype
) -> None:
    positions, slots, table, num_pages = paged_batch(MIXES[mix], page_tokens)
    pages = torch.full((num_pages, 2, kv_heads, page_tokens, head_dim), torch.nan, dtype=dtype)
    keys: dict[int, Tensor] = {}  # slot -> [2, length, kv heads, head_dim]
    for slot in slots.unique().tolist():
        length = int(positions[slots == slot].max()) + 1
        keys[slot] = torch.randn(2, length, kv_heads, head_dim).to(dtype)
        for position in range(length):
            page = int(table[slot, position // page_tokens])
            pages[page, :, :, position % page_tokens] = keys[slot][:, position]
    q = random(len(slots), heads * head_dim, dtype=dtype)
    out = empty(len(slots), heads * head_dim, dtype)
    reference.attention(q, pages, positions, slots, table, window=window, out=out)

    expected = torch.zeros(len(slots), heads, head_dim, dtype=torch.float64)
    for row, (position, slot) in enumerate(zip(positions.tolist(), slots.tolist(), strict=True)):
        for head in range(heads):
            k, v = keys[slot][
                :, max(0, position + 1 - window) if window else 0 : position + 1, head * kv_heads // heads
            ].double()
            scores = k @ q[row].unflatten(0, (heads, head_dim))[head].double() / math.sqrt(head_dim)
            weights = scores.exp() / scores.exp().sum()
            expected[row, head] = weights @ v
    assert_close("attention", out, expected.flatten(1), TOLERANCE[dtype])


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(
    ("page_tokens", "normed", "factor", "head_dim"),
    [(1, False, 1.0, 6), (7, True, 1.0, 6), (16, True, 1.3, 6), (7, False, 1.3, 9), (16, True, 1.0, 8)],
)
def test_rope_append_rotates_and_writes_its_own_rows_only(
    mix: str, page_tokens: int, normed: bool, factor: float, head_dim: int, dtype: torch.dtype
) -> None:
    heads, kv_heads = 5, 1
    positions, slots, table, num_pages = paged_batch(MIXES[mix], page_tokens)
    frequencies = torch.tensor([1.0, 0.1, 0.003])
    pages = torch.full((num_pages, 2, kv_heads, page_tokens, head_dim), torch.nan, dtype=dtype)
    qkv = random(len(slots), (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    q = empty(len(slots), heads * head_dim, dtype)
    x = qkv.double().unflatten(1, (-1, head_dim))
    if normed:
        norms = torch.randn(2, head_dim)
        reference.norm_rope_append(
            qkv, positions, slots, table, frequencies, *norms, eps=1e-2, attention_factor=factor, out=(q, pages)
        )
        weights = norms.double().repeat_interleave(torch.tensor([heads, 2 * kv_heads]), 0)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-2).sqrt() * weights
    else:
        reference.rope_append(qkv, positions, slots, table, frequencies, attention_factor=factor, out=(q, pages))

    # As complex numbers: the pair (x[i], x[i + 3]) turns by e^(i position frequency); what lies behind stays.
    turn = torch.polar(torch.ones(len(slots), 1, 3).double(), positions[:, None, None].double() * frequencies.double())
    turned = torch.complex(x[..., :3], x[..., 3:6]) * turn * factor
    turned = torch.cat((turned.real, turned.imag, x[..., 6:]), -1)
    assert_close("q", q, turned[:, :heads].flatten(1), TOLERANCE[dtype])
    for row, (position, slot) in enumerate(zip(positions.tolist(), slots.tolist(), strict=True)):
        k, v = pages[table[slot, position // page_tokens], :, :, position % page_tokens]
        assert_close(f"k of row {row}", k, turned[row, heads:-kv_heads], 2 * TOLERANCE[dtype])
        assert torch.equal(v, qkv[row].unflatten(0, (-1, head_dim))[-kv_heads:])
    assert int((~pages.isnan()).sum()) == 2 * len(slots) * kv_heads * head_dim


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("renormalise", [True, False])
def test_route_is_the_softmax_of_the_best_experts_made_to_sum_to_one_if_asked(tokens: int, renormalise: bool) -> None:
    logits = random(tokens, 7)
    experts, weights = empty(tokens, 3, torch.int32), empty(tokens, 3, torch.float32)
    reference.route(logits, renormalise=renormalise, out=(experts, weights))
    for row in range(tokens):
        exponentials = {e: math.exp(float(logits[row, e])) for e in range(7)}
        best = sorted(exponentials, key=lambda e: -exponentials[e])[:3]
        assert experts[row].tolist() == best
        total = sum(exponentials[e] for e in (best if renormalise else exponentials))
        expected = torch.tensor([exponentials[e] / total for e in best])
        assert_close("weights", weights[row], expected, 1e-6)


def test_route_takes_the_lower_expert_of_equals() -> None:
    experts, weights = empty(1, 2, torch.int32), empty(1, 2, torch.float32)
    reference.route(torch.tensor([[0.0, 1.0, 1.0, 1.0]]), out=(experts, weights))
    assert experts.tolist() == [[1, 2]]
    assert weights.tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("tokens", TOKENS)
def test_grouped_linear_swiglu_and_combine(tokens: int, dtype: torch.dtype) -> None:
    x, weight = random(tokens, 11, dtype=dtype), torch.randn(5, 14, 11).to(dtype)
    experts = torch.stack([torch.randperm(5)[:2] for _ in range(tokens)] or [torch.empty(2)])[:tokens].int()
    out = empty(tokens, 2 * 7, dtype)
    reference.grouped_linear_swiglu(x, experts, weight, out=out)
    chosen = weight[experts.long()].double()  # [T, k, 2 out, in]
    expected = gated(torch.einsum("tkoi,ti->tko", chosen, x.double())).flatten(1)
    assert_close("grouped_linear_swiglu", out, expected, TOLERANCE[dtype])

    weight = torch.randn(5, 7, 11).to(dtype)
    chosen = weight[experts.long()].double()
    parts, scale, combined = random(tokens, 2 * 11, dtype=dtype), random(tokens, 2), empty(tokens, 7, dtype)
    reference.grouped_combine(parts, experts, scale, weight, out=combined)
    expected = torch.einsum("tkoi,tki,tk->to", chosen, parts.unflatten(1, (2, 11)).double(), scale.double())
    assert_close("grouped_combine", combined, expected, TOLERANCE[dtype])


def test_the_expert_kernels_are_the_block_of_transformers() -> None:
    block = make("mixtral").model.layers[0].mlp
    x, gate_up, down = torch.randn(19, 64), block.experts.gate_up_proj.data, block.experts.down_proj.data
    gate_up = gate_up.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)  # gates and ups take turns
    logits, out = torch.empty(19, 8), torch.empty(19, 64)
    experts, weights, h = torch.empty(19, 2).int(), torch.empty(19, 2), torch.empty(19, gate_up.shape[1])
    reference.linear(x, block.gate.weight.data, out=logits)
    reference.route(logits, out=(experts, weights))
    reference.grouped_linear_swiglu(x, experts, gate_up, out=h)
    reference.grouped_combine(h, experts, weights, down, out=out)
    with torch.no_grad():
        expected = block(x[None])
    assert_close("mixture of experts", out, (expected[0] if isinstance(expected, tuple) else expected)[0])
