"""Copying KV pages between the device and slots of host memory, by a kernel on few SMs.

A page lies in as many pieces as there are layers, a slot in one: a copy engine is told of each piece, and a host that
tells it of thousands spends milliseconds. A kernel reads and writes pinned host memory itself; two SMs keep the link to
the host busy, from the host eight.

Shape legend: P pages of the device, L layers, W words of a page in one layer, S slots, C pages to be copied.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoflow_kernels.checks import check_dtype, check_shape

COPY_WORDS = 4096  # that a program moves at once: all of them are read before the first is written
COPY_WARPS = 16


# Compiled once for each direction: not again for another number of pages, or another place of their ids.
@triton.jit(do_not_specialize=["page_ids_ptr", "slot_ids_ptr", "C"])
def _copy_pages(
    pages_ptr, slots_ptr, page_ids_ptr, slot_ids_ptr, C, L, W, layer_stride, page_stride, slot_stride,
    TO_HOST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """slots[slot_ids[c], l * W + w] = pages[l, page_ids[c], w], or the other way round."""
    blocks = tl.cdiv(W, BLOCK)
    for item in range(tl.program_id(0), C * L * blocks, tl.num_programs(0)):
        word = item % blocks * BLOCK + tl.arange(0, BLOCK)
        inside = word < W
        layer = tl.cast(item // blocks % L, tl.int64)
        copy = item // blocks // L
        page = tl.load(page_ids_ptr + copy).to(tl.int64)
        slot = tl.load(slot_ids_ptr + copy).to(tl.int64)
        on_device = pages_ptr + layer * layer_stride + page * page_stride + word
        on_host = slots_ptr + slot * slot_stride + layer * W + word
        if TO_HOST:
            tl.store(on_host, tl.load(on_device, mask=inside), mask=inside)
        else:
            tl.store(on_device, tl.load(on_host, mask=inside), mask=inside)


def copy_pages(
    pages: Tensor, slots: Tensor, page_ids: Tensor, slot_ids: Tensor, *, to_host: bool, programs: int
) -> None:
    """Copy pages to slots, or, unless `to_host`, slots to pages.

    pages [L, P, W] int64 or uint8, contiguous; slots [S, at least L * W] of the same dtype, rows contiguous, in pinned
    memory of the host; page_ids and slot_ids [C] int32 on the device, no target among them twice. `programs` are the
    SMs that it takes, at most.

    Raises:
        ValueError: names the operand whose shape, strides or dtype is not so.
    """
    layers, _, words = pages.shape
    count = len(page_ids)
    check_dtype("copy_pages", torch.int32, page_ids=page_ids, slot_ids=slot_ids)
    check_dtype("copy_pages", pages.dtype, slots=slots)
    check_shape("copy_pages", "slot_ids", slot_ids, count)
    if not pages.is_contiguous() or slots.stride(1) != 1 or slots.shape[1] < layers * words:
        raise ValueError(
            f"copy_pages: expected contiguous pages and slots of {layers * words} words or more, got "
            f"{tuple(pages.shape)} with strides {pages.stride()} and {tuple(slots.shape)} with {slots.stride()}"
        )
    if count == 0:
        return
    grid = (min(programs, count * layers * triton.cdiv(words, COPY_WORDS)),)
    _copy_pages[grid](
        pages, slots, page_ids, slot_ids, count, layers, words,
        pages.stride(0), pages.stride(1), slots.stride(0),
        TO_HOST=to_host, BLOCK=COPY_WORDS, num_warps=COPY_WARPS,
    )  # fmt: skip
