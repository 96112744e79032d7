"""The products whose rate is a roof, on a GPU: every way to multiply FP8 operands computes the same."""

import pytest
import torch
from nanoflow_kernels import reference

from nanoflow_backend.models.random_values import fill_normal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_the_library_and_our_kernel_multiply_alike() -> None:
    from nanoflow_backend.bench.roofs import _scaled_multiplies

    x, weight = (fill_normal(torch.empty(rows, 256, dtype=torch.float8_e4m3fn, device="cuda")) for rows in (200, 384))
    x_scale, weight_scale = torch.rand(200, 1, device="cuda"), torch.rand(384, device="cuda")
    expected = torch.empty(200, 384)
    reference.scaled_linear(x.cpu(), x_scale.cpu(), weight.cpu(), weight_scale.cpu(), out=expected)
    ways = _scaled_multiplies("cuda")
    assert len(ways) == 2
    for multiply in ways:
        found = torch.empty(200, 384, dtype=torch.bfloat16, device="cuda")
        multiply(x, x_scale, weight, weight_scale, found)
        torch.testing.assert_close(found.float().cpu(), expected, rtol=2e-2, atol=2e-2 * expected.std().item())
