"""This module finds the files of a checkpoint and reads what their headers say of the tensors in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.file import read_file
from nanoflow_backend.config.rules import is_file_name
from nanoflow_backend.model_folder import LFS_START, is_lfs_pointer, lfs_hint

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
COMPARED_ROWS = 1024  # at a time, of two matrices: their memory stays small beside the weights


class WeightsError(ConfigError):
    """A checkpoint that is not this model's: the message names the file, the tensor and what was expected."""


class TensorHeader(NamedTuple):
    """What a file says about one of its tensors."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it


def find_files(folder: Path) -> dict[Path, set[str] | None]:
    """The folder's safetensors files, with the tensors that the index expects in each (None: no index).

    Raises: WeightsError, naming what is missing or contradicts.
    """
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
    if (folder / SINGLE).exists() and SINGLE not in weight_map.values():
        raise WeightsError(f"{folder}: {INDEX} names other files than {SINGLE}, which is here too: remove one of them")
    files: dict[Path, set[str] | None] = {}
    for name in sorted(set(weight_map.values())):
        if not is_file_name(name):
            raise WeightsError(f"{index}: expected names of files in this folder, got {name!r}")
        files[folder / name] = {tensor for tensor, file in weight_map.items() if file == name}
    return files


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def read_headers(files: Mapping[Path, set[str] | None]) -> dict[str, TensorHeader]:
    """What the files say about all their tensors, by name.

    Raises:
        WeightsError: a tensor is in two files, or not where the index says.
    """
    headers: dict[str, TensorHeader] = {}
    for path, indexed in files.items():
        with open_file(path) as file:
            names = sorted(file.keys())
            if indexed is not None and (absent := sorted(indexed - set(names))):
                raise WeightsError(f"{path}: tensor {absent[0]} is missing, {INDEX} says that it is here")
            for name in names:
                if name in headers:
                    raise WeightsError(f"{path}: tensor {name} is in another file too")
                tensor = file.get_slice(name)
                headers[name] = TensorHeader(path, name, tuple(tensor.get_shape()), tensor.get_dtype())
    return headers


def equal(path: Path, name: str, other_path: Path, other_name: str) -> bool:
    """Whether two tensors of one shape have the same values, read a few rows at a time."""
    with open_file(path) as file, open_file(other_path) as other_file:
        one, other = file.get_slice(name), other_file.get_slice(other_name)
        rows = one.get_shape()[0]
        steps = (slice(first, first + COMPARED_ROWS) for first in range(0, rows, COMPARED_ROWS))
        return all(torch.equal(one[step].float(), other[step].float()) for step in steps)


def open_file(path: Path) -> Any:
    """A safetensors file, mapped; to be used in a `with` statement.

    Raises:
        WeightsError: it cannot be read, or is not a whole safetensors file.
    """
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
