"""load: one rank's weights from a Hugging Face folder, streamed: read, cut, convert and place, a tensor at a time."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from rich.console import Console
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanoflow_backend.config import ConfigError, ModelConfig, read_file
from nanoflow_backend.graph.builder import local_shape
from nanoflow_backend.graph.operation import Model, Parameter, Source
from nanoflow_backend.model_folder import LFS_START, is_lfs_pointer, lfs_hint

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = ("F32", "F16", "BF16")  # as safetensors spells them


class WeightsError(ConfigError):
    """A checkpoint that is not this model's: the message names the file, the tensor and what was expected."""


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
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """The parameters of `model` by name, on `device`; those of the layer graph are "layers.{i}.{name}".

    Memory peaks at the weights and one mapped file, of which a rank touches its own slices only. The headers of all
    files are checked before anything is allocated. Rank 0 shows a progress bar where stderr is a terminal.

    Raises:
        WeightsError: a missing or broken file; a missing, unknown, mis-shaped or non-float tensor.
    """
    parameters, aliases = _parameters(model)
    places: dict[str, list[Place]] = {}
    for name, parameter in parameters.items():
        row, turns = 0, parameter.interleave
        for number, source in enumerate(parameter.sources):
            height, turn = local_shape(source, tp)[0] * turns, number % turns
            places.setdefault(source.tensor, []).append(Place(name, source, slice(row + turn, row + height, turns)))
            row += height if turn == turns - 1 else 0
    files = _find_files(folder)
    _check(files, places, config)

    weights = {
        name: torch.zeros(parameter.shape, dtype=dtype, device=device)  # zeros: what no checkpoint row fills is padding
        if parameter.constant is None
        else torch.tensor(parameter.constant, dtype=torch.float32, device=device)
        for name, parameter in parameters.items()
    }
    quiet = rank != 0 or not sys.stderr.isatty()
    with Progress(console=Console(stderr=True), disable=quiet) as bar:
        task = bar.add_task("Loading weights", total=len(places))
        for path in files:
            with _open(path) as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    for parameter_name, source, rows in places.get(name, ()):
                        matrix = weights[parameter_name].view(-1, *local_shape(source, tp)[1:])
                        shard(file.get_slice(name), source, rank, tp, out=matrix[rows])  # keeps no view of the file
                    bar.advance(task, name in places)
    return weights | {alias: weights[name] for alias, name in aliases.items()}


def dummy(
    model: Model, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
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
            weights[name] = torch.ones(parameter.shape, dtype=dtype, device=device)
        else:
            weights[name] = torch.empty(parameter.shape, dtype=dtype, device=device)
            weights[name].normal_(0, 0.02, generator=generator)
    return weights | {alias: weights[name] for alias, name in aliases.items()}


def size_bytes(model: Model, dtype: torch.dtype) -> int:
    """What `load` and `dummy` allocate."""
    parameters, _ = _parameters(model)
    return sum(
        math.prod(p.shape) * (dtype if p.constant is None else torch.float32).itemsize for p in parameters.values()
    )


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


def _parameters(model: Model) -> tuple[dict[str, Parameter], dict[str, str]]:
    """All parameters by full name; and, apart, those that are another one under a second name (tied embeddings)."""
    graphs = {"": model.embed} | {f"layers.{i}.": model.layer for i in range(model.num_layers)}
    named = [(f"{prefix}{p.name}", p, prefix) for prefix, graph in graphs.items() for p in graph.parameters]
    named += [(p.name, p, "") for p in model.head.parameters]
    parameters: dict[str, Parameter] = {}
    aliases: dict[str, str] = {}
    by_content: dict[object, str] = {}
    for name, parameter, prefix in named:
        layer = prefix.removeprefix("layers.").rstrip(".")
        sources = tuple(
            Source(s.tensor.replace("{layer}", layer), s.shape, s.shard, s.units) for s in parameter.sources
        )
        content = (parameter.shape, tuple(s.tensor for s in sources), parameter.interleave, parameter.constant)
        if content in by_content:
            aliases[name] = by_content[content]
        else:
            by_content[content] = name
            parameters[name] = replace(parameter, name=name, sources=sources)
    return parameters, aliases


def _find_files(folder: Path) -> dict[Path, set[str] | None]:
    """The folder's safetensors files, with the tensors that the index expects in each (None: no index)."""
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).exists():
            raise WeightsError(f"{folder}: expected {SINGLE} or {INDEX}, found neither")
        return {folder / SINGLE: None}
    try:
        weight_map = msgspec.json.decode(read_file(index), type=_Index).weight_map
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WeightsError(f"{index}: {error}") from None
    if not weight_map:
        raise WeightsError(f"{index}: weight_map is empty")
    files: dict[Path, set[str] | None] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise WeightsError(f"{index}: expected names of files in this folder, got {name!r}")
        files[folder / name] = {tensor for tensor, file in weight_map.items() if file == name}
    return files


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _check(files: dict[Path, set[str] | None], places: dict[str, list[Place]], config: ModelConfig) -> None:
    found: set[str] = set()
    for path, indexed in files.items():
        with _open(path) as file:
            names = set(file.keys())
            if indexed is not None and (absent := sorted(indexed - names)):
                raise WeightsError(f"{path}: tensor {absent[0]} is missing, {INDEX} says that it is here")
            for name in sorted(names):
                if name not in places:
                    if not _may_be_extra(name, config):
                        raise WeightsError(f"{path}: tensor {name} is not part of this {config.architecture} model")
                    continue
                if name in found:
                    raise WeightsError(f"{path}: tensor {name} is in another file too")
                found.add(name)
                tensor, expected = file.get_slice(name), places[name][0].source.shape
                if tuple(tensor.get_shape()) != expected:
                    raise WeightsError(
                        f"{path}: tensor {name}: expected shape {list(expected)}, got {tensor.get_shape()}"
                    )
                if tensor.get_dtype() not in DTYPES:
                    raise WeightsError(
                        f"{path}: tensor {name}: expected dtype {', '.join(DTYPES)}, got {tensor.get_dtype()}"
                    )
    if missing := sorted(places.keys() - found):
        where = path if len(files) == 1 else path.parent / INDEX
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise WeightsError(f"{where}: tensor {missing[0]} is missing{more}")


def _may_be_extra(name: str, config: ModelConfig) -> bool:
    """Old checkpoints carry the rotary frequencies, and some tied ones the LM head."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings)


def _open(path: Path) -> Any:
    if path.exists() and not path.is_file():
        raise WeightsError(f"{path}: expected a file, got something else")
    try:
        return safe_open(path, framework="pt")
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror or error}") from None
    except SafetensorError as error:
        with path.open("rb") as file:
            if is_lfs_pointer(file.read(len(LFS_START))):
                raise WeightsError(lfs_hint(path)) from None
        raise WeightsError(f"{path}: not a whole safetensors file: {error}") from None
