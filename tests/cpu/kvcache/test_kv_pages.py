"""KvPages: layout and bytes."""

from __future__ import annotations

import pytest
import torch

from nanoflow_backend.config.model_config import ModelConfig, RopeConfig
from nanoflow_backend.kvcache.kv_pages import KvPages, page_bytes

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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_pages_have_a_tile_for_each_head_and_cost_what_is_said(tp: int, kv_heads: int, dtype: torch.dtype) -> None:
    pages = KvPages.allocate(CONFIG, 7, 5, dtype, tp)
    assert pages.tensor.shape == (3, 7, 2, kv_heads, 5, 6)
    assert pages.layer(1)[2, 0, 0].is_contiguous()
    assert (pages.num_pages, pages.page_tokens, pages.dtype) == (7, 5, dtype)
    assert pages.tensor.untyped_storage().nbytes() == 7 * page_bytes(CONFIG, 5, dtype, tp) == 7 * pages.page_bytes
    assert not pages.tensor.float().any()


def test_poisoned_pages_are_nan() -> None:
    assert KvPages.allocate(CONFIG, 2, 3, torch.float16, poison=True).tensor.isnan().all()


def test_pages_of_another_layout_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pages: expected \[layers, .*\], got \(7, 2, 4, 5, 6\)"):
        KvPages(torch.zeros(7, 2, 4, 5, 6))


def test_fewer_layers_than_the_models_are_shared() -> None:
    pages = KvPages.allocate(CONFIG, 2, 3, torch.float32)
    assert [pages.layer(i).data_ptr() for i in range(6)] == [pages.tensor[i % 3].data_ptr() for i in range(6)]
