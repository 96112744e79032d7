"""Products of few tokens on the device: every kind of tiling (see small_m_checks)."""

from __future__ import annotations

import pytest
import torch
from support.kernels.small_m_checks import TILINGS, SmallMChecks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


SHAPES = [(2, 592, 136, None), (16, 4096, 4096, 37), (61, 4096, 4096, None), (128, 1040, 776, 999)]


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("swiglu", [False, True])
def test_products_under_every_tiling(tiling: str, fp8: bool, swiglu: bool) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        checks = SmallMChecks("cuda", dtype, fp8)
        for tokens, inner, width, sms in SHAPES:
            checks.product(TILINGS[tiling], tokens, inner, width, swiglu, sms)
