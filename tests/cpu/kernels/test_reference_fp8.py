"""Every reference kernel in FP8 against formulas written out in float64, on the grid of e4m3 written out by its bits.

Sizes are prime where they can be, and T = 0 and T = 1 are among them.
"""

from __future__ import annotations

import pytest
import torch
from nanoflow_kernels import reference
from support.comparison import assert_close
from torch import Tensor

E4M3 = torch.float8_e4m3fn
TOKENS = (0, 1, 13)
# the magnitudes by their bits: exponent bits 0 are subnormal, and the highest pattern is NaN
GRID = torch.tensor(
    [mantissa / 8 * 2.0**-6 for mantissa in range(8)]
    + [(1 + mantissa / 8) * 2.0 ** (exponent - 7) for exponent in range(1, 16) for mantissa in range(8)][:-1],
    dtype=torch.float64,
)


def nearest(values: Tensor) -> Tensor:
    """The closest e4m3 in float64, the even one of two; beyond the largest, the largest."""
    magnitude = values.double().abs().clamp(max=448)
    above = torch.searchsorted(GRID, magnitude).clamp(max=len(GRID) - 1)
    below = (above - 1).clamp(min=0)
    to_above, to_below = GRID[above] - magnitude, magnitude - GRID[below]
    takes_above = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    return torch.where(takes_above, GRID[above], GRID[below]) * values.double().sign()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def quantised(rows: int, columns: int) -> Tensor:
    return (torch.randn(rows, columns) * 30).to(E4M3)


def outputs(tokens: int, width: int, group: int) -> tuple[Tensor, Tensor]:
    q = torch.full((tokens, width + 3), torch.nan).to(E4M3)[:, :width]
    return q, torch.full((tokens, width // group if group else 1), torch.nan)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("group", [0, 6])
@pytest.mark.parametrize("upper_bound", [0.0, 1.5])
def test_quantise(tokens: int, group: int, upper_bound: float, dtype: torch.dtype) -> None:
    x = (torch.randn(tokens, 30) * torch.logspace(-3, 3, tokens)[:, None]).to(dtype)
    x[1:2] = 0
    q, scale = outputs(tokens, 30, group)
    reference.quantise(x, group=group, upper_bound=upper_bound, out=(q, scale))
    for row in range(tokens):
        for part, values in enumerate(x[row].double().split(group or 30)):
            amax = float(values.abs().max())
            expected = (min(amax, upper_bound) if upper_bound else amax) / 448
            if amax:
                assert float(scale[row, part]) == pytest.approx(expected, rel=1e-6)
            assert float(scale[row, part]) > 0
            start = part * (group or 30)
            grid = nearest((values.float() / scale[row, part]).double())
            assert torch.equal(q[row, start : start + len(values)].double(), grid)


def test_quantise_by_a_static_scale_limits_what_is_beyond_it() -> None:
    x, (q, scale) = torch.tensor([[-900.0, 3.0, 0.25, 1e-9]]), outputs(1, 4, 2)
    reference.quantise(x, torch.tensor([0.5]), group=2, out=(q, scale))
    assert q.float().tolist() == [[-448.0, 6.0, 0.5, 0.0]]
    assert scale.tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("static_scale", [None, torch.tensor([0.01])], ids=["dynamic", "static"])
def test_add_rms_norm_quantise_is_one_kernel_after_the_other(
    tokens: int, static_scale: Tensor | None, dtype: torch.dtype
) -> None:
    residual, update, weight = (torch.randn(n, 30).to(dtype) for n in (tokens, tokens, 1))
    kept, normed, (q, scale) = residual.clone(), residual.clone(), outputs(tokens, 30, 6)
    reference.add_rms_norm(residual, update, weight[0], eps=1e-5, out=(kept, normed))
    reference.quantise(normed, static_scale, group=6, upper_bound=2.0, out=(q, scale))
    actual = torch.empty_like(kept), *outputs(tokens, 30, 6)
    reference.add_rms_norm_quantise(
        residual, update, weight[0], static_scale, eps=1e-5, group=6, upper_bound=2.0, out=actual
    )
    for ours, theirs in zip(actual, (kept, q, scale), strict=True):
        assert torch.equal(ours.float(), theirs.float())


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("run", [1, 5])
def test_swiglu_quantise(tokens: int, run: int, dtype: torch.dtype) -> None:
    pairs = (torch.randn(tokens, 60) * 3).to(dtype)
    q, scale = outputs(tokens, 30, 6)
    reference.swiglu_quantise(pairs, run=run, group=6, out=(q, scale))
    expected = outputs(tokens, 30, 6)
    reference.quantise(gated(pairs, run).to(dtype), group=6, out=expected)
    error = {torch.float32: 1e-3, torch.float16: 1e-3, torch.bfloat16: 3e-3}[
        dtype
    ]  # a value may fall to the other side
    assert_close("scale", scale, expected[1], error)
    assert_close("swiglu", reference.dequantise(q, scale), reference.dequantise(*expected), error)


def gated(pairs: Tensor, run: int) -> Tensor:
    columns = torch.arange(pairs.shape[1])
    gate, up = pairs[:, columns // run % 2 == 0].double(), pairs[:, columns // run % 2 == 1].double()
    return gate / (1 + (-gate).exp()) * up


def weight_of(rows: int, columns: int, blocks: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, its scales, and what they stand for in float64."""
    weight = quantised(rows, columns)
    if not blocks:
        scale = torch.rand(rows) + 0.1
        return weight, scale, weight.double() * scale.double()[:, None]
    scale = torch.rand(-(-rows // 128), -(-columns // 128)) + 0.1
    row, column = torch.arange(rows)[:, None] // 128, torch.arange(columns) // 128
    return weight, scale, weight.double() * scale[row, column].double()


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_scaled_linear(tokens: int, blocks: bool, bias: bool) -> None:
    x, x_scale = quantised(tokens, 256), torch.rand(tokens, 2 if blocks else 1) + 0.1
    weight, weight_scale, w = weight_of(151, 256, blocks)
    b = torch.randn(151) * 1e4 if bias else None
    out = torch.full((tokens, 151), torch.nan)
    reference.scaled_linear(x, x_scale, weight, weight_scale, b, out=out)
    expected = (x.double() * x_scale.double().repeat_interleave(128 if blocks else 256, 1)) @ w.T
    assert_close("scaled_linear", out, expected + b.double() if bias else expected, 1e-6)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("blocks", [False, True])
def test_scaled_linear_swiglu(tokens: int, blocks: bool) -> None:
    x, x_scale = quantised(tokens, 256), (torch.rand(tokens, 2 if blocks else 1) + 0.1) / 1e4
    weight, weight_scale, w = weight_of(512, 256, blocks)
    out = torch.full((tokens, 256), torch.nan)
    reference.scaled_linear_swiglu(x, x_scale, weight, weight_scale, out=out)
    pairs = (x.double() * x_scale.double().repeat_interleave(128 if blocks else 256, 1)) @ w.T
    assert_close("scaled_linear_swiglu", out, gated(pairs, 128 if blocks else 1), 1e-6)


@pytest.mark.parametrize("tokens", TOKENS)
def test_scaled_experts(tokens: int) -> None:
    experts = torch.rand(tokens, 5).argsort(1)[:, :2].int()
    x, x_scale = quantised(tokens, 11), torch.rand(tokens, 1) / 1e3
    weight, scale = quantised(5 * 14, 11).unflatten(0, (5, 14)), torch.rand(5, 14)
    out = torch.full((tokens, 2 * 7), torch.nan)
    reference.scaled_grouped_linear_swiglu(x, x_scale, experts, weight, scale, out=out)
    chosen = (weight.double() * scale.double()[..., None])[experts.long()]  # [T, k, out, in]
    pairs = torch.einsum("tkoi,ti->tko", chosen, x.double() * x_scale.double())
    assert_close("scaled_grouped_linear_swiglu", out, gated(pairs.flatten(0, 1), 1).reshape(tokens, 14), 1e-6)

    weight, scale = quantised(5 * 7, 11).unflatten(0, (5, 7)), torch.rand(5, 7)
    parts, part_scale, weights = quantised(tokens, 22), torch.rand(tokens, 2), torch.rand(tokens, 2)
    out = torch.full((tokens, 7), torch.nan)
    reference.scaled_grouped_combine(parts, part_scale, experts, weights, weight, scale, out=out)
    chosen = (weight.double() * scale.double()[..., None])[experts.long()]
    values = parts.double().unflatten(1, (2, 11)) * part_scale.double()[..., None]
    assert_close("combine", out, torch.einsum("tkoi,tki,tk->to", chosen, values, weights.double()), 1e-6)


def test_pages_of_e4m3_hold_what_attention_reads() -> None:
    """Two heads of queries on one of keys: three tokens of a request are appended and attend to each other."""
    qkv, scales = torch.randn(3, 4 * 8) * 5, torch.tensor([0.02, 0.5])
    positions, slots, table = torch.arange(3).int(), torch.zeros(3).int(), torch.tensor([[2, 1]]).int()
    pages, q = torch.full((4, 2, 1, 2, 8), torch.nan).to(E4M3), torch.empty(3, 16)
    reference.rope_append(qkv, positions, slots, table, torch.zeros(4), scales, out=(q, pages))  # angles of 0
    k, v = nearest(qkv[:, 16:24] / scales[0]), nearest(qkv[:, 24:] / scales[1])
    assert torch.equal(pages[[2, 2, 1], 0, 0, [0, 1, 0]].double(), k)
    assert k.abs().max() == 448  # some was beyond
    assert torch.equal(pages[[2, 2, 1], 1, 0, [0, 1, 0]].double(), v)
    assert int((~pages.isnan()).sum()) == 2 * 3 * 8
    out = torch.empty(3, 16)
    reference.attention(q, pages, positions, slots, table, scales, out=out)
    scores = torch.einsum("thd,jd->thj", q.double().unflatten(1, (2, 8)), k * float(scales[0])) / 8**0.5
    scores = scores.masked_fill(torch.ones(3, 3).triu(1).bool()[:, None], -torch.inf)
    assert_close("attention", out, (scores.softmax(-1) @ (v * float(scales[1]))).flatten(1), 1e-6)
