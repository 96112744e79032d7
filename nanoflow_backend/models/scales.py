"""Scales of FP8: which tensors they are, what they must look like, and how they are found where weights have none."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
from nanoflow_kernels.reference.quantised import SMALLEST_AMAX
from nanoflow_kernels.reference.rows import E4M3_MAX
from torch import Tensor

from nanoflow_backend.config.quantization import BLOCK, Quantization
from nanoflow_backend.graph.operation import Parameter, ScaleOf, Source
from nanoflow_backend.models.checkpoint import WeightsError
from nanoflow_backend.models.quantization.tensor_names import INPUT_SCALE, KV_SCALES

ONE_NUMBER: tuple[tuple[int, ...], ...] = ((), (1,), (1, 1))  # shapes of it


def scale_sources(parameter: Parameter, quantization: Quantization | None) -> tuple[Source, ...]:
    """What a parameter is read from: if it holds scales, the scale tensors of its sources, a row for each of its rows.

    A source's shape is what the loader makes of it: a scale a row where the checkpoint has one a tensor. There is none
    of weights that are quantised as they are read.
    """
    match parameter.scale, quantization:
        case None, _:
            return parameter.sources
        case ScaleOf.KV, _:
            attention = (source.tensor.rsplit(".", 2)[0] for source in parameter.sources)
            names = zip(attention, KV_SCALES, strict=True)
            return tuple(Source(f"{module}.{scale}", (1,)) for module, scale in names)
        case ScaleOf.INPUT, _:
            return tuple(Source(_beside(source, INPUT_SCALE), (1,)) for source in parameter.sources)
        case ScaleOf.WEIGHT, Quantization(at_load=False):
            return tuple(_of_weight(source, quantization) for source in parameter.sources)
    return ()


def stored_shapes(parameter: Parameter, source: Source, quantization: Quantization | None) -> list[tuple[int, ...]]:
    """The shapes that a file may have for a source of scale_sources."""
    if parameter.scale is None:
        return [source.shape]
    if parameter.scale is not ScaleOf.WEIGHT or quantization is None or quantization.weights == "tensor":
        return list(ONE_NUMBER)
    return [source.shape] if quantization.weights == "block" else [source.shape, (*source.shape, 1)]


def read_scales(stored: Tensor, source: Source, path: Path, name: str) -> Tensor:
    """fp32, of the source's shape.

    Raises:
        WeightsError: a scale that is no positive number.
    """
    scales = stored.float()
    good = scales.isfinite() & (scales > 0)
    if not good.all():
        raise WeightsError(f"{path}: tensor {name}: expected scales > 0, got {scales[~good][0].item():g}")
    return scales.reshape(()).expand(source.shape) if scales.numel() == 1 else scales.reshape(source.shape)


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(weight [..., columns] in e4m3, its scale [...] in fp32), with which a row's largest value is e4m3's largest."""
    values = weight.to(torch.float32, copy=True)
    scale = torch.linalg.vector_norm(values, math.inf, -1).clamp(SMALLEST_AMAX) / E4M3_MAX
    values.div_(scale[..., None]).clamp_(-E4M3_MAX, E4M3_MAX)
    return values.to(torch.float8_e4m3fn), scale


def quantise_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(weight [rows, columns] in e4m3, its scales [rows / BLOCK, columns / BLOCK] in fp32)."""
    rows, columns = (size // BLOCK for size in weight.shape)
    blocks = weight.view(rows, BLOCK, columns, BLOCK).transpose(1, 2)
    quantised, scale = quantise_rows(blocks.flatten(2))
    return quantised.view(blocks.shape).transpose(1, 2).reshape(weight.shape), scale


def _beside(source: Source, scale: str) -> str:
    return f"{source.tensor.removesuffix('.weight')}.{scale}"


def _of_weight(source: Source, quantization: Quantization) -> Source:
    """A scale for each row, cut as rows are; or one for each block, cut where whole blocks are."""
    name, units = _beside(source, quantization.weight_scale), source.units
    if quantization.weights != "block":
        rows = Source(name, source.shape[:1], paired=source.paired)
        return replace(rows, shard=0, units=units) if source.shard == 0 else rows
    if source.shard is not None and units and source.shape[source.shard] // units % BLOCK:
        units = 0  # several heads share a block: ranks that hold whole blocks hold the same share of them
    return Source(name, (-(-source.shape[0] // BLOCK), -(-source.shape[1] // BLOCK)), source.shard, units)
