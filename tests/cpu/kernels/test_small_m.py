"""Products of few tokens in the kernel language's interpreter: every kind of tiling (see small_m_checks)."""

from __future__ import annotations

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("the kernels are compiled here: see tests/gpu", allow_module_level=True)

from nanoflow_kernels.arrivals import MAX_COUNTERS, arrival_counters
from support.kernels.small_m_checks import TILINGS, SmallMChecks

# the interpreter's own, on conversions that the kernels mean
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("swiglu", [False, True])
def test_products_under_every_tiling(tiling: str, fp8: bool, swiglu: bool) -> None:
    checks = SmallMChecks("cpu", torch.float16, fp8)
    for tokens, inner, width, sms in ((5, 592, 136, None), (61, 400, 200, 2)):
        checks.product(TILINGS[tiling], tokens, inner, width, swiglu, sms)


def test_counters_are_zero_between_launches_and_refuse_too_many() -> None:
    cpu = torch.device("cpu")
    SmallMChecks("cpu", torch.float16, False).product(TILINGS["more parts than tiles"], 5, 592, 136, False, None)
    assert not arrival_counters(MAX_COUNTERS, cpu).any()
    with pytest.raises(ValueError, match=f"arrival counters: expected at most {MAX_COUNTERS} a launch, got 1025"):
        arrival_counters(MAX_COUNTERS + 1, cpu)
