"""Counting for nothing, in the kernel language's interpreter."""

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("the kernels are compiled here", allow_module_level=True)

from nanoflow_search.hardware.spin import spin


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")  # the interpreter's own
def test_every_program_counts_its_rounds() -> None:
    out = torch.zeros(3, dtype=torch.int32)
    spin(5, out=out)
    expected = torch.arange(3)
    for _ in range(5):
        expected = (expected * 1664525 + 1013904223) % 2**32
    assert [value % 2**32 for value in out.tolist()] == expected.tolist()
