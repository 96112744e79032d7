"""The kernel that copies pages, in the kernel language's interpreter: every word goes where it should, and no other."""

from __future__ import annotations

import pytest
import torch
from nanoflow_kernels import copy_pages as module
from nanoflow_kernels.copy_pages import copy_pages
from support.kernels.page_copies import SHAPES, random_pages

from nanoflow_backend.runtime.page_copies import as_words

if torch.cuda.is_available():
    pytest.skip("the kernels are compiled here: see tests/gpu", allow_module_level=True)


# the interpreter's own
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("programs", [1, 3])
def test_pages_go_to_slots_and_back(shape: tuple[int, ...], programs: int) -> None:
    kv = random_pages(shape, torch.bfloat16 if shape[-1] > 3 else torch.uint8, "cpu")
    before = kv.tensor.view(torch.uint8).flatten(2).clone()
    slots = torch.zeros(4, 4096 * -(-kv.page_bytes // 4096), dtype=torch.uint8)
    pages, host = as_words(kv.tensor, slots)
    assert (pages.dtype == torch.int64) == (before.shape[2] % 8 == 0)
    ids, targets = torch.tensor([4, 0, 3], dtype=torch.int32), torch.tensor([2, 0, 3], dtype=torch.int32)
    copy_pages(pages, host, ids, targets, to_host=True, programs=programs)
    for page, slot in zip(ids.tolist(), targets.tolist(), strict=True):
        assert torch.equal(slots[slot, : kv.page_bytes], before[:, page].reshape(-1))
    assert not slots[1].any()
    copy_pages(pages, host, torch.tensor([1], dtype=torch.int32), targets[:1], to_host=False, programs=programs)
    before[:, 1] = before[:, 4]
    assert torch.equal(kv.tensor.view(torch.uint8).flatten(2), before)


def test_no_pages_are_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_copy_pages", None)
    none = torch.zeros(0, dtype=torch.int32)
    copy_pages(torch.zeros(2, 3, 4), torch.zeros(5, 8), none, none, to_host=True, programs=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": torch.zeros(5, 7)}, "expected contiguous pages and slots of 8 words or more"),
        ({"slots": torch.zeros(5, 8, dtype=torch.int64)}, "slots: expected torch.float32"),
        ({"pages": torch.zeros(2, 4, 3).transpose(1, 2)}, "expected contiguous pages"),
        ({"page_ids": torch.zeros(1, dtype=torch.int64)}, "page_ids: expected torch.int32"),
        ({"slot_ids": torch.zeros(2, dtype=torch.int32)}, "slot_ids"),
    ],
)
def test_wrong_operands_are_named(change: dict[str, torch.Tensor], message: str) -> None:
    one = torch.zeros(1, dtype=torch.int32)
    operands = {"pages": torch.zeros(2, 3, 4), "slots": torch.zeros(5, 8), "page_ids": one, "slot_ids": one} | change
    with pytest.raises(ValueError, match=message):
        copy_pages(**operands, to_host=True, programs=2)
