"""Files of a checkpoint that are missing, broken or hostile, and what is said about them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models.loading import load_rank
from torch import Tensor

from benchmarks.models.checkpoints import make, save
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.models.checkpoint import WeightsError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
State = dict[str, Tensor]


def test_an_index_beside_a_whole_file_is_refused(tmp_path: Path) -> None:
    save(make("llama"), tmp_path, max_shard_size="60KB")
    save(make("llama"), tmp_path / "whole")
    (tmp_path / "whole" / SINGLE).rename(tmp_path / SINGLE)
    with pytest.raises(WeightsError, match=r"names other files than model\.safetensors, which is here too"):
        load_rank(tmp_path)


UP = "model.layers.1.mlp.up_proj.weight"


def rewrite(change: Callable[[State], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        state = load_file(folder / SINGLE)
        change(state)
        save_file(state, folder / SINGLE)

    return apply


def truncate(folder: Path) -> None:
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-1])


def split(**edits: Any) -> Callable[[Path], None]:
    """Cut the checkpoint in two files with an index, with mistakes in the files (`drop`, `both`) or the index."""

    def apply(folder: Path) -> None:
        state = load_file(folder / SINGLE)
        (folder / SINGLE).unlink()
        file_of = {name: "b.safetensors" if "layers.1" in name else "a.safetensors" for name in state}
        for file in ("a.safetensors", "b.safetensors"):
            part = {n: t for n, t in state.items() if file_of[n] == file or n == edits.get("both")}
            save_file({n: t for n, t in part.items() if n != edits.get("drop")}, folder / file)
        (folder / INDEX).write_text(edits.get("index", json.dumps({"metadata": {}, "weight_map": file_of})))
        if edits.get("unlink"):
            (folder / "b.safetensors").unlink()

    return apply


BROKEN: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing": (rewrite(lambda s: s.pop(UP)), [SINGLE, UP, "is missing"]),
    "two missing": (rewrite(lambda s: [s.pop(UP), s.pop("lm_head.weight")]), [SINGLE, "lm_head.weight", "1 more"]),
    "unknown": (rewrite(lambda s: s.update(surprise=torch.zeros(2))), [SINGLE, "surprise", "not part of"]),
    "of a third layer": (
        rewrite(lambda s: s.update({UP.replace("1", "2"): s[UP].clone()})),
        [SINGLE, "layers.2.mlp.up_proj", "not part of"],
    ),
    "transposed": (
        rewrite(lambda s: s.update({UP: s[UP].T.contiguous()})),
        [SINGLE, UP, "expected shape [97, 64], got [64, 97]"],
    ),
    "flat": (rewrite(lambda s: s.update({UP: s[UP].flatten()})), [SINGLE, UP, "expected shape", "[6208]"]),
    "int8": (rewrite(lambda s: s.update({UP: s[UP].to(torch.int8)})), [SINGLE, UP, "expected dtype", "got I8"]),
    "float64": (rewrite(lambda s: s.update({UP: s[UP].double()})), [SINGLE, UP, "expected dtype", "got F64"]),
    "no file": (lambda folder: (folder / SINGLE).unlink(), ["expected model.safetensors or", "found neither"]),
    "truncated": (truncate, [SINGLE, "not a whole safetensors file"]),
    "empty file": (lambda folder: (folder / SINGLE).write_bytes(b""), [SINGLE, "not a whole safetensors file"]),
    "not safetensors": (
        lambda folder: (folder / SINGLE).write_bytes(b"PK\x03\x04" * 99),
        [SINGLE, "not a whole safetensors file"],
    ),
    "a missing shard": (split(unlink=True), ["b.safetensors", "No such file"]),
    "not where the index says": (split(drop=UP), ["b.safetensors", UP, INDEX]),
    "in two shards": (split(both=UP), ["b.safetensors", UP, "in another file too"]),
    "index is not JSON": (split(index="{"), [INDEX]),
    "index without a map": (split(index="{}"), [INDEX, "weight_map"]),
    "index of nothing": (split(index='{"weight_map": {}}'), [INDEX, "weight_map is empty"]),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_is_wrong_is_named(fault: str, tmp_path: Path) -> None:
    break_it, words = BROKEN[fault]
    save(make("llama"), tmp_path)
    load_rank(tmp_path)
    break_it(tmp_path)
    with pytest.raises(WeightsError) as error:
        load_rank(tmp_path)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_right_index_is_read(tmp_path: Path) -> None:
    save(make("llama"), tmp_path)
    before = load_rank(tmp_path)
    split()(tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_rank(tmp_path).items())


def _index_names(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / SINGLE).rename(folder / "elsewhere.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))

    return change


def _header(size: int, content: bytes = b"") -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / SINGLE).write_bytes(size.to_bytes(8, "little") + content)

    return change


def _tensor(shape: list[int], offsets: list[int]) -> Callable[[Path], None]:
    content = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
    return _header(len(content), content + bytes(8))


def _replaced(make: Callable[[Path], None], name: str = SINGLE) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return change


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "parent": (_index_names("../secret.safetensors"), "expected names of files in this folder, got '../secret"),
    "absolute": (_index_names("/etc/passwd"), "expected names of files in this folder, got '/etc/passwd'"),
    "empty": (_index_names(""), "expected names of files in this folder, got ''"),
    "dots": (_index_names(".."), "expected names of files in this folder, got '..'"),
    "long": (_index_names("x" * 300), "expected names of files in this folder, got 'xxx"),
    "NUL": (_index_names("a\0b"), r"expected names of files in this folder, got 'a\\x00b'"),
    "deep index": (_replaced(lambda path: path.write_bytes(b'{"a":' * 10**5) and None, INDEX), "recursion"),
    "huge header": (_header(2**62), "not a whole safetensors file"),
    "header beyond the file": (_header(10**6, b"{}"), "not a whole safetensors file"),
    "deep header": (_header(10**6, b'{"a":' * 200_000), "not a whole safetensors file"),
    "offsets beyond the file": (_tensor([10**9], [0, 4 * 10**9]), "not a whole safetensors file"),
    "negative offsets": (_tensor([2], [-8, 0]), "not a whole safetensors file"),
    "shape beyond its bytes": (_tensor([2**60], [0, 8]), "not a whole safetensors file"),
    "pickle": (_replaced(lambda path: torch.save({"a": torch.ones(2)}, path)), "not a whole safetensors file"),
    "pipe": (_replaced(os.mkfifo), "expected a file, got something else"),
    "device": (_replaced(lambda path: path.symlink_to("/dev/zero")), "expected a file, got something else"),
    "loop of links": (_replaced(lambda path: path.symlink_to(path.name)), "expected model.safetensors|symbolic"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_at_once(tmp_path: Path, name: str) -> None:
    change, complaint = HOSTILE[name]
    folder = save(make("llama", num_hidden_layers=1), tmp_path)
    change(folder)
    with pytest.raises(WeightsError, match=complaint):
        load_rank(folder)


def test_links_into_a_cache_of_downloads_are_followed(tmp_path: Path) -> None:
    folder = save(make("llama", num_hidden_layers=1), tmp_path / "snapshot")
    before = load_rank(folder)
    (tmp_path / "blobs").mkdir()
    for file in list(folder.iterdir()):
        file.rename(tmp_path / "blobs" / file.name)
        file.symlink_to(Path("..", "blobs", file.name))
    after = load_rank(folder)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_config_of_a_million_layers_is_refused(tmp_path: Path) -> None:
    folder = save(make("llama", num_hidden_layers=1), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**6}))
    with pytest.raises(ConfigError, match=r"num_hidden_layers: expected an integer in 1\.\.4096, got 1000000"):
        load_rank(folder)
