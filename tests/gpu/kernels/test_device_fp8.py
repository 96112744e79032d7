"""Every kernel in FP8 on the device, with activations in bf16 and fp16, against its reference (see fp8_checks)."""

from __future__ import annotations

from random import Random

import pytest
import torch
import triton
import triton.language as tl
from nanoflow_kernels.quantise import to_e4m3
from support.kernels.checks import E4M3
from support.kernels.fp8_checks import Fp8Checks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOKENS = (0, 1, 13, 2053)
MIXES = {
    "one decode of a long request": [(30_011, 1)],
    "decodes of very different lengths": [(0, 1), (1, 1), (63, 1), (64, 1), (4099, 1), (127, 1), (128, 1)],
    "chunks and decodes": [(7, 1), (1310, 1), (0, 5), (61, 300), (3, 11), (2000, 517)],
    "few rows": [(61, 9), (1310, 1), (0, 3)],
    "nothing": [],
}
HEADS = [(4, 4), (8, 2), (16, 2), (3, 1)]  # groups of 1, 4, 8 and 3


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def checks(request: pytest.FixtureRequest) -> Fp8Checks:
    return Fp8Checks("cuda", request.param)


@triton.jit
def _cast(x_ptr, out_ptr, COUNT: tl.constexpr):
    i = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    tl.store(out_ptr + i, to_e4m3(tl.load(x_ptr + i)))


def test_the_cast_is_that_of_torch() -> None:
    """A million values of every size, and the odd ones."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2**20, generator=random) * torch.exp2(torch.rand(2**20, generator=random) * 24 - 14)
    x[:5] = torch.tensor([torch.nan, torch.inf, -torch.inf, 464.0, 465.0])
    out = torch.zeros(2**20, dtype=E4M3, device="cuda")
    _cast[(1024,)](x.cuda(), out, 1024)
    expected = x.clamp(-448, 448).to(E4M3).float()
    assert torch.equal(out.cpu().float().nan_to_num(77), expected.nan_to_num(77))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("width", "group"), [(4099, 0), (4096, 128), (14336, 0), (2 * 7168, 7168)])
def test_quantise(checks: Fp8Checks, tokens: int, width: int, group: int) -> None:
    checks.quantise(tokens, width, group, 0.0, None)
    checks.quantise(tokens, width, group, 1.5, None)
    checks.quantise(tokens, width, group, 0.0, 0.037)
    checks.swiglu_quantise(tokens, width, group, 1)
    if group == 128:
        checks.swiglu_quantise(tokens, width, group, 128)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("width", "group"), [(4099, 0), (4096, 128)])
def test_add_rms_norm_quantise(checks: Fp8Checks, tokens: int, width: int, group: int) -> None:
    checks.add_rms_norm_quantise(tokens, width, group)
    checks.add_rms_norm_quantise(tokens, width, group, 0.037)


@pytest.mark.parametrize("tokens", [*TOKENS, 29, 61, 112, 389])
@pytest.mark.parametrize("num_sms", [None, 37, 999])
@pytest.mark.parametrize("blocks", [False, True])
def test_scaled_products(checks: Fp8Checks, tokens: int, num_sms: int | None, blocks: bool) -> None:
    inner = 1024 if blocks else 1040
    for bias in (False, True):
        for wide in (False, True):
            checks.scaled_linear(tokens, inner, 776, blocks=blocks, bias=bias, wide=wide, num_sms=num_sms)
    checks.scaled_linear(tokens, inner, 1024, blocks=blocks, bias=True, wide=False, num_sms=num_sms)
    checks.scaled_linear_swiglu(tokens, inner, 1024 if blocks else 776, blocks=blocks, num_sms=num_sms)


@pytest.mark.parametrize("tokens", TOKENS)
def test_scaled_products_of_experts(checks: Fp8Checks, tokens: int) -> None:
    checks.scaled_grouped(tokens, 8, 2, 272, 264)
    checks.scaled_grouped(tokens, 7, 3, 71, 137)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_rope_append_to_pages_of_e4m3(checks: Fp8Checks, mix: str, head_dim: int) -> None:
    for page_tokens in (7, 64):
        for normed, pairs in ((False, None), (True, None), (False, 3 * head_dim // 8), (True, 5)):
            scales = (0.013, 0.002)
            checks.rope_append(MIXES[mix], 8, 2, head_dim, page_tokens, 3, kv_scales=scales, normed=normed, pairs=pairs)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("page_tokens", [7, 16, 64, 128])
def test_attention_over_pages_of_e4m3(checks: Fp8Checks, mix: str, head_dim: int, page_tokens: int) -> None:
    """In bf16 with queries that fp16 does not hold."""
    scales = (1e-6, 3.0) if checks.dtype == torch.bfloat16 else (0.7, 0.01)
    for heads, kv_heads in HEADS:
        checks.attention(MIXES[mix], heads, kv_heads, head_dim, page_tokens, 3, None, scales)


@pytest.mark.parametrize(("page_tokens", "num_sms"), [(16, None), (64, 37), (64, None)])
def test_attention_of_1000_requests_of_very_unequal_lengths(page_tokens: int, num_sms: int | None) -> None:
    random = Random(3)
    lengths = [min(40_000, int(random.lognormvariate(4.5, 1.5))) for _ in range(1000)]
    mix = [(length, 1) for length in lengths[:950]] + [(length, 1 + length % 61) for length in lengths[950:]]
    Fp8Checks("cuda", torch.bfloat16).attention(mix, 4, 1, 128, page_tokens, 13, num_sms, (0.7, 0.01))
