"""Random values of every dtype, e4m3 too, which torch draws none of."""

import pytest
import torch

from nanoflow_backend.models import random_values
from nanoflow_backend.models.random_values import FP8_DEVIATION, fill_normal


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_values_are_normal_and_seeded(monkeypatch, dtype):
    monkeypatch.setattr(random_values, "PART", 1000)
    one, other = (
        fill_normal(torch.empty(60, 70, dtype=dtype), 0.5, torch.Generator().manual_seed(3)).float() for _ in range(2)
    )
    assert torch.equal(one, other)
    assert one.mean().item() == pytest.approx(0, abs=0.03)
    assert one.std().item() == pytest.approx(0.5, rel=0.05)
    assert len(one[:, 0].unique()) > 30, "parts differ"


def test_strides_do_not_matter():
    values = fill_normal(torch.empty(70, 60, dtype=torch.float8_e4m3fn).t(), 0.5)
    assert values.shape == (60, 70)
    assert values.float().std().item() == pytest.approx(0.5, rel=0.05)


def test_e4m3_by_itself_is_like_quantised_rows():
    values = fill_normal(torch.empty(4, 50_000, dtype=torch.float8_e4m3fn)).float()
    assert values.std().item() == pytest.approx(FP8_DEVIATION, rel=0.02)
    assert values.abs().max() == 448
