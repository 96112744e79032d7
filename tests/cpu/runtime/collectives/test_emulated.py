"""A rank that runs alone: what it asks of the kernel, how long that takes, and that numbers stay the whole model's."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nanoflow_kernels import reference
from support.models.batches import Requests, forward
from support.models.shapes import config
from torch import Tensor

from nanoflow_backend.config.network_table import NetworkHeader, NetworkTable
from nanoflow_backend.config.precision import FLOAT32
from nanoflow_backend.kvcache.kv_pages import KvPages
from nanoflow_backend.models.model import build
from nanoflow_backend.models.weights import dummy
from nanoflow_backend.runtime.binding import Binding
from nanoflow_backend.runtime.collectives.emulated import Emulated
from nanoflow_backend.runtime.collectives.one_rank import OneRank
from nanoflow_backend.runtime.cpu import CpuProgram
from nanoflow_backend.schedule.presets import nano_batched


def network(ranks: int, gb_per_s: float = 1e3) -> NetworkTable:
    header = NetworkHeader(name="assumed", device="cpu", ranks=ranks, source="a test")
    return NetworkTable.at_rate(header, sms=8, gb_per_s=gb_per_s)


def exchanges(ranks: int, gb_per_s: float = 1e3) -> tuple[Emulated, list[dict[str, Any]]]:
    """Collectives, and what each of their calls passes to the kernel."""
    seen: list[dict[str, Any]] = []

    def timed_exchange(x: Tensor, *, out: Tensor, **options: Any) -> None:
        seen.append(options)
        reference.timed_exchange(x, out=out, **options)

    kernels = SimpleNamespace(timed_exchange=timed_exchange, add_rms_norm=reference.add_rms_norm)
    return Emulated(network(ranks, gb_per_s), kernels), seen


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_sums_have_the_rms_of_as_many_independent_updates(ranks: int, tokens: int) -> None:
    collectives, seen = exchanges(ranks)
    width, mine = 512 * ranks, -(-tokens // ranks)
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(tokens))
    for name, rows, columns in (
        ("all_reduce", tokens, width),
        ("reduce_scatter_columns", tokens, 512),
        ("reduce_scatter_rows", mine, width),
    ):
        out = torch.full((rows, columns), torch.nan)
        getattr(collectives, name)(x, out=out, num_sms=3)
        rms = out.square().mean().sqrt().item()
        assert rms == pytest.approx(math.sqrt(ranks), rel=0.15), name
    part, whole = x[:mine], torch.full((tokens, width), torch.nan)
    collectives.all_gather_rows(part, out=whole)
    assert torch.equal(whole, part.repeat(ranks, 1)[:tokens])
    part = x[:, :512]
    collectives.all_gather_columns(part, out=whole)
    assert torch.equal(whole, part.repeat(1, ranks))
    assert [options["num_sms"] for options in seen] == 5 * [8], "the network's own: it has no other"


def test_calls_take_the_time_of_the_whole_tensor() -> None:
    collectives, seen = exchanges(ranks=4, gb_per_s=0.01)
    x, narrow = torch.ones(8, 32), torch.ones(8, 8)
    begin_s = time.perf_counter()
    collectives.all_reduce(x, out=torch.empty(8, 32))
    collectives.reduce_scatter_rows(x, out=torch.empty(2, 32))
    collectives.all_gather_columns(narrow, out=torch.empty(8, 32))
    once_us = 8 * 32 * 4 * 3 / 4 / 0.01e3
    assert [options["us"] for options in seen] == pytest.approx([2 * once_us, once_us, once_us])
    assert time.perf_counter() - begin_s >= 4e-6 * once_us


def test_the_fused_form_norms_by_the_devices_kernel() -> None:
    collectives, seen = exchanges(ranks=2)
    residual, update, weight = torch.randn(3, 16), torch.randn(5, 16), torch.rand(16)
    kept, normed = torch.empty(3, 16), torch.empty(5, 16)
    collectives.reduce_scatter_add_rms_norm_all_gather(residual, update, weight, eps=1e-5, out=(kept, normed))
    summed = update[:3].clone()
    summed[:2] += update[3:]
    torch.testing.assert_close(kept, residual + summed)
    expected = kept / (kept.square().mean(1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(normed, expected.repeat(2, 1)[:5])
    assert len(seen) == 2


@pytest.mark.parametrize(("ranks", "parts"), [(2, 1), (8, 3)])
def test_the_residual_of_a_shard_has_the_rms_of_the_whole_models(ranks: int, parts: int) -> None:
    shape = config("llama", hidden_size=256, intermediate_size=512, head_dim=32, num_kv_heads=8, num_layers=6)
    requests = Requests(shape, [24, 24, 24])
    batch = [(slot, 0, 24) for slot in range(3)]

    def rms(tp: int) -> list[float]:
        model = build(shape, tp)
        pages = KvPages.allocate(shape, requests.num_pages, requests.page_tokens, torch.float32, tp)
        collectives = Emulated(network(tp), reference) if tp > 1 else OneRank()
        schedule = nano_batched(model.layer, 72, parts)
        binding = Binding(
            model, [schedule], dummy(model), pages, collectives, reference, max_tokens=72, precision=FLOAT32
        )
        program = CpuProgram(binding, checked=True)
        forward(program, requests.inputs(batch))
        residual, update = binding.results(program.plan)
        return [value.square().mean().sqrt().item() for value in (residual, update)]

    assert rms(ranks) == pytest.approx(rms(1), rel=0.12)
