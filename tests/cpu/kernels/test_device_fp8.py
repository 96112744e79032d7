"""The device kernels in FP8, in the kernel language's interpreter, against their reference (see fp8_checks)."""

from __future__ import annotations

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("the kernels are compiled here: see tests/gpu", allow_module_level=True)

import triton
import triton.language as tl
from nanoflow_kernels import device as kernels
from nanoflow_kernels.quantise import to_e4m3
from support.kernels.checks import E4M3
from support.kernels.fp8_checks import Fp8Checks

# the interpreter's own, on conversions and on infinities that the kernels mean
pytestmark = [pytest.mark.filterwarnings(f"ignore::{name}") for name in ("DeprecationWarning", "RuntimeWarning")]
TOKENS = (0, 1, 13)
MIXES = {
    "decodes of very different lengths": [(0, 1), (1, 1), (63, 1), (64, 1), (389, 1), (127, 1)],
    "chunks and decodes": [(7, 1), (131, 1), (0, 5), (61, 67), (3, 11)],
    "few rows": [(61, 9), (131, 1), (0, 3)],
    "nothing": [],
}


@pytest.fixture(params=[torch.float32, torch.float16], ids=str)
def checks(request: pytest.FixtureRequest) -> Fp8Checks:
    return Fp8Checks("cpu", request.param)


@triton.jit
def _cast(x_ptr, out_ptr, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.store(out_ptr + i, to_e4m3(tl.load(x_ptr + i)))


def test_the_cast_rounds_to_the_nearest_e4m3() -> None:
    """All values that e4m3 has, all that lie half-way, those beside them, and what is beyond."""
    values = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    half_way = (values[1:] + values[:-1]) / 2
    magnitudes = torch.cat(
        [values, half_way, half_way * (1 + 1e-6), half_way * (1 - 1e-6), torch.tensor([464, 465, 1e9])]
    )
    x = torch.cat([magnitudes, -magnitudes, torch.tensor([torch.nan, torch.inf])])
    x = torch.nn.functional.pad(x, (0, 2048 - len(x)))
    out = torch.zeros(2048, dtype=E4M3)
    _cast[(1,)](x, out, 2048)
    assert torch.equal(out.float().nan_to_num(77), x.clamp(-448, 448).to(E4M3).float().nan_to_num(77))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("width", "group"), [(1031, 0), (1024, 128), (411, 137)])
def test_quantise(checks: Fp8Checks, tokens: int, width: int, group: int) -> None:
    checks.quantise(tokens, width, group, 0.0, None)
    checks.quantise(tokens, width, group, 1.5, None)
    checks.quantise(tokens, width, group, 0.0, 0.037)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("width", "group"), [(1031, 0), (1024, 128)])
def test_add_rms_norm_quantise(checks: Fp8Checks, tokens: int, width: int, group: int) -> None:
    checks.add_rms_norm_quantise(tokens, width, group)
    checks.add_rms_norm_quantise(tokens, width, group, 0.037)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("width", "group", "run"), [(1031, 0, 1), (512, 128, 128), (411, 137, 1)])
def test_swiglu_quantise(checks: Fp8Checks, tokens: int, width: int, group: int, run: int) -> None:
    checks.swiglu_quantise(tokens, width, group, run)
    checks.swiglu_quantise(tokens, width, group, run, 0.037)


@pytest.mark.parametrize("tokens", [*TOKENS, 149])
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("num_sms", [None, 2])
def test_scaled_products(checks: Fp8Checks, tokens: int, blocks: bool, num_sms: int | None) -> None:
    inner = 256 if blocks else 144
    for bias in (False, True):
        checks.scaled_linear(tokens, inner, 136, blocks=blocks, bias=bias, wide=bias, num_sms=num_sms)
    checks.scaled_linear_swiglu(tokens, inner, 256 if blocks else 136, blocks=blocks, num_sms=num_sms)


@pytest.mark.parametrize("tokens", [*TOKENS, 149])
def test_scaled_products_of_experts(checks: Fp8Checks, tokens: int) -> None:
    checks.scaled_grouped(tokens, 5, 2, 80, 137)


@pytest.mark.parametrize("mix", MIXES)
def test_rope_append_to_pages_of_e4m3(checks: Fp8Checks, mix: str) -> None:
    for normed in {False, mix == "few rows"}:
        pairs = 24 if normed else None  # of a part of each head
        checks.rope_append(MIXES[mix], 5, 1, 64, 7, 3, kv_scales=(0.013, 0.002), normed=normed, pairs=pairs)


# groups of 1, 3, 4 and 8 query heads; pages gathered and in tiles; queries that fp16 does not hold
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_tokens", "padding", "num_sms"),
    [(4, 1, 64, 32, 0, None), (2, 2, 64, 64, 3, 1), (8, 1, 128, 64, 1, 99), (3, 1, 64, 7, 2, 2)],
)
def test_attention_over_pages_of_e4m3(
    mix: str, heads: int, kv_heads: int, head_dim: int, page_tokens: int, padding: int, num_sms: int | None
) -> None:
    checks = Fp8Checks("cpu", torch.float16 if page_tokens == 64 else torch.float32)
    checks.tolerance = 1e-3  # operands are fp16
    scales = (0.7, 3.0) if page_tokens == 64 else (1e-6, 3.0)
    checks.attention(MIXES[mix], heads, kv_heads, head_dim, page_tokens, padding, num_sms, scales)


def test_errors_name_the_operand() -> None:
    x, q, scale = torch.ones(4, 32), torch.ones(4, 32).to(E4M3), torch.ones(4, 1)
    with pytest.raises(ValueError, match=r"quantise: q: expected torch.float8_e4m3fn, got torch.float32"):
        kernels.quantise(x, out=(x, scale))
    with pytest.raises(ValueError, match=r"quantise: scale: expected shape \(4, 2\), got \(4, 1\)"):
        kernels.quantise(x, group=16, out=(q, scale))
    with pytest.raises(ValueError, match=r"quantise: group: expected a divisor of 32 columns, got 24"):
        kernels.quantise(x, group=24, out=(q, scale))
    with pytest.raises(ValueError, match=r"add_rms_norm_quantise: group: expected 0 or a power of two, got 3"):
        kernels.add_rms_norm_quantise(
            x[:, :6], x[:, :6], x[0, :6], eps=1e-5, group=3, out=(x[:, :6], q[:, :6], x[:, :2])
        )
    with pytest.raises(ValueError, match=r"scaled_linear: x_scale: expected shape \(4, 1\), got \(4, 32\)"):
        kernels.scaled_linear(q, x, q, x[0, :4], out=x[:, :4])
    with pytest.raises(ValueError, match=r"rope_append: pages: expected torch.float8_e4m3fn, got torch.float32"):
        kernels.rope_append(x, x[0], x[0], x, x[0], torch.ones(2), out=(x, torch.ones(1, 2, 1, 4, 16)))
