"""Scales are found where weights have none, and cut among ranks as their weights are."""

from __future__ import annotations

import pytest
import torch

from nanoflow_backend.config.quantization import BLOCK, Quantization
from nanoflow_backend.graph.builder import local_shape
from nanoflow_backend.graph.operation import Parameter, ScaleOf, Source
from nanoflow_backend.models.placement import shard
from nanoflow_backend.models.scales import quantise_blocks, quantise_rows, scale_sources


def nearest(values: torch.Tensor) -> torch.Tensor:
    """e4m3 by its definition: four bits of exponent, three of mantissa, steps of 2^-9 below 2^-6."""
    step = 2.0 ** (torch.floor(torch.log2(values.abs().clamp(2.0**-6))) - 3)
    return torch.round(values / step) * step


def test_rows_are_quantised_by_their_largest_value() -> None:
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    weight[3] = 0
    weight[4] *= 1e-6
    quantised, scale = quantise_rows(weight)
    assert (quantised.dtype, scale.dtype, scale.shape) == (torch.float8_e4m3fn, torch.float32, (40,))
    largest = weight.double().abs().amax(1)
    filled = largest > 0
    assert torch.allclose(scale.double()[filled], largest[filled] / 448, rtol=1e-7)
    assert not quantised[3].float().any()
    assert 0 < scale[3] < 1e-20
    exact = nearest(weight.double() / scale.double()[:, None])
    wrong = quantised.double() != exact
    assert wrong.float().mean() < 1e-3  # quotients in fp32 that fall on the middle of two
    assert (quantised.float().abs().amax(1)[filled] == 448).all()


def test_blocks_are_quantised_by_their_largest_value() -> None:
    weight = torch.randn(2 * BLOCK, 3 * BLOCK, generator=torch.Generator().manual_seed(2))
    quantised, scale = quantise_blocks(weight)
    assert scale.shape == (2, 3)
    for row in range(2):
        for column in range(3):
            block = (slice(row * BLOCK, (row + 1) * BLOCK), slice(column * BLOCK, (column + 1) * BLOCK))
            rows, of_rows = quantise_rows(weight[block].flatten())
            assert scale[row, column] == of_rows
            assert torch.equal(quantised[block].float().flatten(), rows.float())


def test_scales_of_rows_that_come_as_pairs_follow_their_rows() -> None:
    """2 heads of 6 rows, of which 4 are rotated."""
    weight = Source("q.weight", (12, 8), shard=0, units=2, paired=4)
    parameter = Parameter("qkv.weight.scale", (12,), (weight,), scale=ScaleOf.WEIGHT)
    (scales,) = scale_sources(parameter, Quantization(method="compressed-tensors", weights="channel"))
    assert shard(torch.arange(12), scales, 0, 1).tolist() == [0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11]
    assert shard(torch.arange(12), scales, 1, 2).tolist() == [6, 8, 7, 9, 10, 11]


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("units", "size"), [(0, 1024), (8, 64), (6, 64), (16, 32), (5, 256), (2, 128), (1, 256), (3, 384)]
)
@pytest.mark.parametrize("dim", [0, 1])
def test_scales_of_blocks_are_cut_as_the_blocks_are(units: int, size: int, dim: int, tp: int) -> None:
    """For every cut that leaves whole blocks; others are refused with the graph."""
    shape = [2 * BLOCK, 2 * BLOCK]
    shape[dim] = max(units, 1) * size
    source = Source("m.weight", tuple(shape), shard=dim, units=units)
    if any(each % BLOCK for each in local_shape(source, tp)):
        return
    blocks = Quantization(method="fp8", weights="block", activations="group")
    parameter = Parameter("w.scale", (), (source,), scale=ScaleOf.WEIGHT)
    (of_blocks,) = scale_sources(parameter, blocks)
    scales = torch.arange(1.0, 1 + of_blocks.shape[0] * of_blocks.shape[1]).view(of_blocks.shape)
    spread = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: shape[0], : shape[1]]
    for rank in range(tp):
        mine = shard(scales, of_blocks, rank, tp).repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        expected = shard(spread, source, rank, tp)
        assert torch.equal(mine[: expected.shape[0], : expected.shape[1]], expected), rank
        assert mine.shape[dim] - expected.shape[dim] < BLOCK


def test_a_scale_a_row_is_cut_where_rows_are() -> None:
    rows = Quantization(method="fbgemm_fp8")
    cut, whole = Source("a.weight", (24, 8), shard=0, units=3), Source("b.weight", (24, 8), shard=1)
    of_cut, of_whole = scale_sources(Parameter("w.scale", (), (cut, whole), scale=ScaleOf.WEIGHT), rows)
    assert (of_cut, of_whole) == (Source("a.weight_scale", (24,), 0, 3), Source("b.weight_scale", (24,)))
