"""This module loads one rank's weights from a Hugging Face folder: it reads, cuts, converts and places each tensor."""

from __future__ import annotations

import logging
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from nanoflow_backend.config.model_config import ModelConfig
from nanoflow_backend.config.precision import FLOAT32, Precision
from nanoflow_backend.config.quantization import FP8
from nanoflow_backend.graph.model import Model
from nanoflow_backend.graph.operation import Parameter, ScaleOf
from nanoflow_backend.models import checkpoint
from nanoflow_backend.models.fused import split
from nanoflow_backend.models.parameters import (
    E4M3,
    by_loaders_names,
    check,
    find_stand_ins,
    named_parameters,
    wanted_tensors,
)
from nanoflow_backend.models.placement import Place, find_places, put, shard, shards
from nanoflow_backend.models.registry import ARCHITECTURES
from nanoflow_backend.models.scales import quantise_blocks, quantise_rows, read_scales

CHUNK_ELEMENTS = 2**18  # of a weight that are quantised at a time: what that takes is small beside the weights
DUMMY_INPUT_SCALE = 0.02  # static: of inputs up to 9

log = logging.getLogger(__name__)


def load(
    folder: Path,
    config: ModelConfig,
    model: Model,
    *,
    rank: int = 0,
    tp: int = 1,
    precision: Precision = FLOAT32,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """The parameters of `model` by name, on `device`; those of layer i are "layers.{i}.{name}".

    Memory peaks at the weights and one mapped file, of which a rank touches its own slices only. The headers of all
    files are checked before anything is allocated. Rank 0 shows a progress bar where stderr is a terminal.
    An LM head that is tied by the config but has weights of its own keeps them, with a warning, as in transformers 5.
    Weights that config.quantization quantises at load are so a few rows at a time, with a scale for what this rank has
    of a row. KV scales that the checkpoint does not have are 1.

    Raises:
        WeightsError: a missing or broken file; a missing, unknown, mis-shaped or non-float tensor; a scale that is no
            positive number.
    """
    files = checkpoint.find_files(folder)
    wanted = wanted_tensors(model, config.quantization)
    headers = by_loaders_names(checkpoint.read_headers(files).values(), config.quantization)
    headers = split(headers, wanted, ARCHITECTURES[config.architecture].fused)
    check(headers, wanted, config, files)
    parameters, aliases = named_parameters(model, config.quantization, find_stand_ins(headers, wanted))
    if rank == 0 and any(p.scale is ScaleOf.KV and p.sources[0].tensor not in headers for p in parameters.values()):
        log.info("%s: has no scales for K and V in FP8: they are 1", folder)
    places = find_places(parameters, tp)
    weights = {name: _allocate(parameter, precision, device) for name, parameter in parameters.items()}
    quiet = rank != 0 or not sys.stderr.isatty()
    with Progress(console=Console(stderr=True), disable=quiet) as bar:
        task = bar.add_task("Loading weights", total=len(places))
        for path in files:
            with checkpoint.open_file(path) as file:
                for name, header in headers.items():
                    if header.path != path or name not in places:
                        continue
                    for place in places[name]:
                        _read(file, header, place, weights, rank, tp)
                    bar.advance(task)
    return weights | {alias: weights[name] for alias, name in aliases.items()}


def _read(
    file: Any, header: checkpoint.TensorHeader, place: Place, weights: dict[str, Tensor], rank: int, tp: int
) -> None:
    """Write one rank's part of a tensor to its place; no view of the file is kept."""
    parameter, out = place.parameter, place.of(weights[place.parameter.name])
    if parameter.scale is not None:
        scales = read_scales(checkpoint.whole(file, header), place.source, header.path, header.name)
        part = shard(scales, place.source, rank, tp)
        put(torch.maximum(out[0], part.to(out.device)) if parameter.scale is ScaleOf.INPUT else part, out)
    elif parameter.dtype == FP8 and header.dtype != E4M3:
        rows = replace(place.source, shape=place.source.shape[:1])
        scales = place._replace(source=rows).of(weights[f"{parameter.name}.scale"])
        for first, part in shards(checkpoint.lazy(file, header), place.source, rank, tp, CHUNK_ELEMENTS):
            quantised, scale = quantise_rows(part.to(out.device))
            put(quantised, out[first:])
            put(scale, scales[first:])
    else:
        put(shard(checkpoint.lazy(file, header), place.source, rank, tp), out)


def dummy(
    model: Model, *, precision: Precision = FLOAT32, device: torch.device | str = "cpu", seed: int = 0
) -> dict[str, Tensor]:
    """Random weights, made on the device, under the names that `load` gives: norms are 1, all else N(0, 0.02).

    For measurements: the values of weights change the power that a GPU draws, and so its speed. Those in FP8 are
    quantised a few rows at a time, each row or block with the scale that it needs.
    """
    parameters, aliases = named_parameters(model)
    generator = torch.Generator(device).manual_seed(seed)
    weights = {name: _allocate(parameter, precision, device) for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        if parameter.scale is ScaleOf.INPUT:
            weights[name].fill_(DUMMY_INPUT_SCALE)
        elif parameter.constant is not None or parameter.scale is not None:
            continue
        elif name.endswith("norm.weight"):
            weights[name].fill_(1)
        elif parameter.dtype == FP8:
            _draw_quantised(weights[name], weights[f"{name}.scale"], generator)
        else:
            weights[name].normal_(0, 0.02, generator=generator)
    return weights | {alias: weights[name] for alias, name in aliases.items()}


def _draw_quantised(weight: Tensor, scale: Tensor, generator: torch.Generator) -> None:
    """Fill a weight [..., columns] and its scales, a row's or a block's."""
    rows = weight.view(-1, weight.shape[-1])
    in_blocks = scale.ndim == weight.ndim
    scales = scale.view(-1, scale.shape[-1]) if in_blocks else scale.view(-1)
    rows_a_scale = len(rows) // len(scales)
    step = max(CHUNK_ELEMENTS // (rows.shape[1] * rows_a_scale), 1)  # of scales
    for first in range(0, len(scales), step):
        part = rows[first * rows_a_scale : (first + step) * rows_a_scale]
        drawn = torch.empty(part.shape, device=part.device).normal_(0, 0.02, generator=generator)
        quantised, found = (quantise_blocks if in_blocks else quantise_rows)(drawn)
        part.copy_(quantised)
        scales[first : first + step] = found


def size_bytes(model: Model, precision: Precision) -> int:
    """What `load` and `dummy` allocate."""
    parameters, _ = named_parameters(model)
    return sum(math.prod(p.shape) * precision.element_bytes(p.dtype) for p in parameters.values())


def _allocate(parameter: Parameter, precision: Precision, device: torch.device | str) -> Tensor:
    """Zeros, for what no checkpoint row fills is padding; ones for scales of K and V; or the constant."""
    if parameter.constant is not None:
        return torch.tensor(parameter.constant, dtype=torch.float32, device=device)
    dtype: torch.dtype = getattr(torch, precision.dtype(parameter.dtype))
    make = torch.ones if parameter.scale is ScaleOf.KV else torch.zeros
    return make(parameter.shape, dtype=dtype, device=device)
