"""This module loads one rank's weights from a Hugging Face folder: it reads, cuts, converts and places each tensor."""

from __future__ import annotations

import logging
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from nanoflow_backend.config.model_config import ModelConfig
from nanoflow_backend.config.precision import FLOAT32, Precision
from nanoflow_backend.graph.builder import local_shape
from nanoflow_backend.graph.model import Model
from nanoflow_backend.graph.operation import Graph, Parameter, Source
from nanoflow_backend.models import checkpoint
from nanoflow_backend.models.checkpoint import INDEX, TensorHeader, WeightsError
from nanoflow_backend.models.fused import split
from nanoflow_backend.models.registry import ARCHITECTURES

DTYPES = ("F32", "F16", "BF16")  # as safetensors spells them
UNUSED = {  # tensors that some checkpoints have and no model reads, and why
    r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.(original_)?inv_freq": "rotary frequencies follow from config.json",
    r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.(cos|sin)_cached": "rotary tables follow from config.json",
}


log = logging.getLogger(__name__)


class Place(NamedTuple):
    """Where one rank's part of a checkpoint tensor goes: `rows` of a parameter."""

    parameter: str
    source: Source
    rows: slice


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

    Raises:
        WeightsError: a missing or broken file; a missing, unknown, mis-shaped or non-float tensor.
    """
    files = checkpoint.find_files(folder)
    sources = _sources(model)
    fused = ARCHITECTURES[config.architecture].fused
    headers = split(checkpoint.read_headers(files), sources, fused)
    _check(headers, sources, config, files)
    parameters, aliases = _parameters(model, _stand_ins(headers, sources))
    places: dict[str, list[Place]] = {}
    for name, parameter in parameters.items():
        row, turns = 0, parameter.interleave
        for number, source in enumerate(parameter.sources):
            height, turn = local_shape(source, tp)[0] * turns, number % turns
            places.setdefault(source.tensor, []).append(Place(name, source, slice(row + turn, row + height, turns)))
            row += height if turn == turns - 1 else 0
    weights = {  # zeros: what no checkpoint row fills is padding
        name: torch.zeros(parameter.shape, dtype=_dtype(parameter, precision), device=device)
        if parameter.constant is None
        else torch.tensor(parameter.constant, dtype=torch.float32, device=device)
        for name, parameter in parameters.items()
    }
    quiet = rank != 0 or not sys.stderr.isatty()
    with Progress(console=Console(stderr=True), disable=quiet) as bar:
        task = bar.add_task("Loading weights", total=len(places))
        for path in files:
            with checkpoint.open_file(path) as file:
                for name in (name for name, header in headers.items() if header.path == path):
                    for parameter_name, source, rows in places.get(name, ()):
                        matrix = weights[parameter_name].view(-1, *local_shape(source, tp)[1:])
                        # no name for the tensor: that would keep the file mapped
                        shard(checkpoint.lazy(file, name, headers[name]), source, rank, tp, out=matrix[rows])
                    bar.advance(task, name in places)
    return weights | {alias: weights[name] for alias, name in aliases.items()}


def dummy(
    model: Model, *, precision: Precision = FLOAT32, device: torch.device | str = "cpu", seed: int = 0
) -> dict[str, Tensor]:
    """Random weights, made on the device, under the names that `load` gives: norms are 1, all else N(0, 0.02).

    For measurements: the values of weights change the power that a GPU draws, and so its speed.
    """
    parameters, aliases = _parameters(model)
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for name, parameter in parameters.items():
        if parameter.constant is not None:
            weights[name] = torch.tensor(parameter.constant, dtype=torch.float32, device=device)
        elif name.endswith("norm.weight"):
            weights[name] = torch.ones(parameter.shape, dtype=_dtype(parameter, precision), device=device)
        else:
            weights[name] = torch.empty(parameter.shape, dtype=_dtype(parameter, precision), device=device)
            weights[name].normal_(0, 0.02, generator=generator)
    return weights | {alias: weights[name] for alias, name in aliases.items()}


def size_bytes(model: Model, precision: Precision) -> int:
    """What `load` and `dummy` allocate."""
    parameters, _ = _parameters(model)
    return sum(math.prod(p.shape) * precision.element_bytes(p.dtype) for p in parameters.values())


def _dtype(parameter: Parameter, precision: Precision) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, precision.dtype(parameter.dtype))
    return dtype


def shard(tensor: Any, source: Source, rank: int, tp: int, *, out: Tensor) -> None:
    """Write one rank's part of `tensor` (lazy or not) to the beginning of `out`, of shape local_shape(source, tp).

    Ranks hold whole units; where those run out, the rest of `out` stays as it is.
    """
    part = tensor[_cut(source, rank, tp)]
    out[tuple(slice(size) for size in part.shape)] = part


def _cut(source: Source, rank: int, tp: int) -> tuple[slice, ...]:
    """The slice of a checkpoint tensor that `rank` holds. Ranks share a unit where there are fewer units than ranks."""
    whole = tuple(slice(None) for _ in source.shape)
    if source.shard is None or tp == 1:
        return whole
    units = source.units or source.shape[source.shard]
    if source.units and units < tp:
        first, last = rank * units // tp, rank * units // tp + 1
    else:
        here = -(-units // tp)
        first, last = min(rank * here, units), min((rank + 1) * here, units)
    size = source.shape[source.shard] // units
    return *whole[: source.shard], slice(first * size, last * size), *whole[source.shard + 1 :]


def _sources(model: Model) -> dict[str, Source]:
    """The checkpoint tensors that the model can be made of, by name: of two that are tied, both."""
    named = {
        source.tensor.replace("{layer}", layer): source
        for layer, graph in _graphs(model)
        for parameter in graph.parameters
        for source in parameter.sources
    }
    return named | {s.tied_to: replace(s, tied_to=None) for s in named.values() if s.tied_to and s.tied_to not in named}


def _graphs(model: Model) -> list[tuple[str, Graph]]:
    """The graphs that have parameters, in order, each with the number of its layer ("" where it is none)."""
    return [("", model.embed), *((str(i), graph) for i, graph in enumerate(model.in_order)), ("", model.head)]


def _tied(sources: Mapping[str, Source]) -> dict[str, str]:
    return {name: source.tied_to for name, source in sources.items() if source.tied_to is not None}


def _stand_ins(headers: Mapping[str, TensorHeader], sources: Mapping[str, Source]) -> dict[str, str]:
    """Which tensor is read in the place of a tied one: the one of the two that the checkpoint has, or that is equal."""
    stand_ins = {}
    for name, twin in _tied(sources).items():
        if twin not in headers:
            stand_ins[twin] = name
        elif name not in headers or checkpoint.equal(headers[name].path, name, headers[twin].path, twin):
            stand_ins[name] = twin
        else:
            log.warning(
                "%s: tensor %s differs from %s, to which config.json ties it (tie_word_embeddings): both are kept. "
                "Set tie_word_embeddings to false to load them without this warning.",
                headers[name].path, name, twin,
            )  # fmt: skip
    return stand_ins


def _parameters(
    model: Model, stand_ins: Mapping[str, str] | None = None
) -> tuple[dict[str, Parameter], dict[str, str]]:
    """All parameters by full name; and, apart, those that are another one under a second name (tied embeddings).

    `stand_ins` are the tensors that are read in the place of others; by default every tied one has a stand-in.
    """
    stand_ins = _tied(_sources(model)) if stand_ins is None else stand_ins
    parameters: dict[str, Parameter] = {}
    aliases: dict[str, str] = {}
    by_content: dict[object, str] = {}
    for layer, graph in _graphs(model):
        for parameter in graph.parameters:
            name = f"layers.{layer}.{parameter.name}" if layer else parameter.name
            tensors = [source.tensor.replace("{layer}", layer) for source in parameter.sources]
            sources = tuple(
                replace(source, tensor=stand_ins.get(tensor, tensor), tied_to=None)
                for tensor, source in zip(tensors, parameter.sources, strict=True)
            )
            content = (parameter.shape, tuple(s.tensor for s in sources), parameter.interleave, parameter.constant)
            if content in by_content:
                aliases[name] = by_content[content]
            else:
                by_content[content] = name
                parameters[name] = replace(parameter, name=name, sources=sources)
    return parameters, aliases


def _check(
    headers: Mapping[str, TensorHeader],
    sources: Mapping[str, Source],
    config: ModelConfig,
    files: Mapping[Path, object],
) -> None:
    """Raise WeightsError where the tensors are not those that the model is made of."""
    for name, (path, shape, dtype, *_) in headers.items():
        if name not in sources:
            if not any(re.fullmatch(pattern, name) for pattern in UNUSED):
                raise WeightsError(f"{path}: tensor {name} is not part of this {config.architecture} model")
            continue
        if shape != sources[name].shape:
            raise WeightsError(f"{path}: tensor {name}: expected shape {list(sources[name].shape)}, got {list(shape)}")
        if dtype not in DTYPES:
            raise WeightsError(f"{path}: tensor {name}: expected dtype {', '.join(DTYPES)}, got {dtype}")
    tied = _tied(sources)
    enough = headers.keys() | {a for pair in tied.items() for a in pair if headers.keys() & set(pair)}
    if missing := sorted(sources.keys() - tied.keys() - enough):
        path = next(iter(files))
        where = path if len(files) == 1 else path.parent / INDEX
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise WeightsError(f"{where}: tensor {missing[0]} is missing{more}")
