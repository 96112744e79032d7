"""The KV page tensors."""

from __future__ import annotations

import pytest
import torch

from nanoflow_backend.config.model_config import ModelConfig, RopeConfig
from nanoflow_backend.kvcache.storage import allocate, page_bytes

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=11,
    hidden_size=32,
    intermediate_size=8,
    num_layers=3,
    num_heads=8,
    num_kv_heads=4,
    head_dim=6,
    rms_norm_eps=1e-5,
    rope=RopeConfig(),
    max_model_tokens=64,
)


@pytest.mark.parametrize(("tp", "kv_heads"), [(1, 4), (2, 2), (4, 1), (8, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_have_a_tile_for_each_head_and_cost_what_is_said(tp: int, kv_heads: int, dtype: torch.dtype) -> None:
    pages = allocate(CONFIG, 7, 5, dtype, tp)
    assert pages.shape == (3, 7, 2, kv_heads, 5, 6)
    assert pages[1, 2, 0, 0].is_contiguous()
    assert pages.untyped_storage().nbytes() == 7 * page_bytes(CONFIG, 5, dtype, tp)
    assert not pages.any()


def test_poisoned_pages_are_nan() -> None:
    assert allocate(CONFIG, 2, 3, torch.float16, poison=True).isnan().all()
