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

    for name in ("matmul", "_scaled_mm"):
        monkeypatch.setattr(torch, name, recorded(name))
    monkeypatch.setattr(roofs, "_sustained", lambda work, amount, seconds, device: (work(), amount)[1])
    return ran


@pytest.mark.parametrize("dtype", ["bfloat16", FP8])
@pytest.mark.parametrize("architecture", shapes.CONFIGS)
def test_a_layers_products_are_counted(products, architecture, dtype):
    config = shapes.config(architecture)
    quantised = replace(config, quantization=AT_LOAD)
    for each in (config, quantised):
        products.clear()
        counted = roofs.gemm_flop_per_s(build(each), each, TOKENS, dtype, "cpu")
        assert counted == sum(flop for _, flop in products)
        assert {found for found, _ in products} == {getattr(torch, dtype)}
    dense = 16 * (32 + 2 * 8) + 32 * 16
    mlp = 3 * 16 * 37 * (2 if architecture == "mixtral" else 1)
    router = 16 * 8 if architecture == "mixtral" else 0
    assert counted == 2 * TOKENS * (dense + mlp + router)
