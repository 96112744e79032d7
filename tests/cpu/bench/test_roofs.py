"""Roofs count the products that they run: those of a layer of each kind, in the dtype that is asked for."""

import pytest
import torch
from msgspec.structs import replace
from support.models import shapes

from nanoflow_backend.bench import roofs
from nanoflow_backend.config.quantization import AT_LOAD, FP8
from nanoflow_backend.models.model import build

TOKENS = 12


@pytest.fixture
def products(monkeypatch):
    """(operands' dtype, FLOPs) of each product that torch computes."""
    ran = []

    def recorded(name):
        product = getattr(torch, name)

        def run(x, weight, *scales, **options):
            ran.append((x.dtype, 2 * x.numel() * weight.shape[-1]))
            return product(x, weight, *scales, **options)

        return run

    def counted(work, amount, seconds, device):
        work()
        return roofs.Rate(amount, seconds, None, None)

    for name in ("matmul", "_scaled_mm"):
        monkeypatch.setattr(torch, name, recorded(name))
    monkeypatch.setattr(roofs, "_sustained", counted)
    return ran


@pytest.mark.parametrize("dtype", ["bfloat16", FP8])
@pytest.mark.parametrize("architecture", shapes.CONFIGS)
def test_a_layers_products_are_counted(products, architecture, dtype):
    config = replace(shapes.config(architecture), quantization=AT_LOAD)
    counted = roofs.gemm_flop_per_s(build(config), config, TOKENS, dtype, "cpu").per_s
    assert counted == sum(flop for _, flop in products)
    assert {found for found, _ in products} == {getattr(torch, dtype)}
    dense = 16 * (32 + 2 * 8) + 32 * 16
    mlp = 3 * 16 * 37 * (2 if architecture == "mixtral" else 1)
    router = 16 * 8 if architecture == "mixtral" and dtype != FP8 else 0  # stays in 16 bits
    assert counted == 2 * TOKENS * (dense + mlp + router)


def test_of_two_ways_to_multiply_the_faster_one_counts(monkeypatch):
    config = replace(shapes.config("llama"), quantization=AT_LOAD)
    ways, rates = [lambda *operands: None] * 2, iter([3.0, 5.0])
    monkeypatch.setattr(roofs, "_scaled_multiplies", lambda device: ways)
    monkeypatch.setattr(roofs, "_sustained", lambda *_: roofs.Rate(next(rates), 1.0, None, None))
    assert roofs.gemm_flop_per_s(build(config), config, TOKENS, FP8, "cpu").per_s == 5.0
