"""Checkpoints that transformers saved, as every rank should hold them; broken ones, and what is said about them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.models.checkpoints import make, save
from nanoflow_backend.config import ConfigError, ModelConfig
from nanoflow_backend.graph.builder import local_shape
from nanoflow_backend.graph.operation import Source
from nanoflow_backend.models import checkpoint
from nanoflow_backend.models.checkpoint import WeightsError
from nanoflow_backend.models.model import build
from nanoflow_backend.models.weights import load, shard

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
State = dict[str, Tensor]


def load_rank(folder: Path, rank: int = 0, tp: int = 1, dtype: torch.dtype = torch.float32) -> State:
    config = ModelConfig.from_pretrained(folder)
    return load(folder, config, build(config, tp), rank=rank, tp=tp, dtype=dtype)


def pieces(tensor: Tensor, count: int, dim: int) -> list[Tensor]:
    """`count` equal pieces along `dim`, the last ones filled up with zeros."""
    size = -(-tensor.shape[dim] // count)
    padding = torch.zeros_like(tensor).narrow(dim, 0, size * count - tensor.shape[dim])
    return list(torch.cat((tensor, padding), dim).split(size, dim))


def take_turns(gate: Tensor, up: Tensor) -> Tensor:
    """A row of each [..., rows, columns]."""
    return torch.stack((gate, up), -2).flatten(-3, -2)


def expected(model: PreTrainedModel, rank: int, tp: int) -> State:
    """The layer-0 weights, embeddings and head of one rank, from the model's own modules (8 heads, head_dim 16)."""
    layer = model.model.layers[0]
    attention, kv_heads = layer.self_attn, model.config.num_key_value_heads
    copies = max(tp // kv_heads, 1)

    def heads(parameter: Tensor, units: int) -> Tensor:
        return pieces(parameter.data, min(tp, units), 0)[rank // copies if units < tp else rank]

    state = {
        "embed.weight": model.get_input_embeddings().weight.data,
        "norm.weight": model.model.norm.weight.data,
        "lm_head.weight": pieces(model.get_output_embeddings().weight.data, tp, 0)[rank],
        "layers.0.input_layernorm.weight": layer.input_layernorm.weight.data,
        "layers.0.post_attention_layernorm.weight": layer.post_attention_layernorm.weight.data,
        "layers.0.o.weight": pieces(attention.o_proj.weight.data, tp, 1)[rank],
    }
    projections = ((attention.q_proj, 8), (attention.k_proj, kv_heads), (attention.v_proj, kv_heads))
    state["layers.0.qkv.weight"] = torch.cat([heads(p.weight, n) for p, n in projections])
    if attention.q_proj.bias is not None:
        state["layers.0.qkv.bias"] = torch.cat([heads(p.bias, n) for p, n in projections])
    if model.config.model_type == "mixtral":
        experts = layer.mlp.experts
        gate, up = experts.gate_up_proj.data.chunk(2, 1)
        state["layers.0.router.weight"] = layer.mlp.gate.weight.data
        state["layers.0.gate_up.weight"] = take_turns(pieces(gate, tp, 1)[rank], pieces(up, tp, 1)[rank])
        state["layers.0.down.weight"] = pieces(experts.down_proj.data, tp, 2)[rank]
    else:
        mlp = layer.mlp
        gate_up = [pieces(p.weight.data, tp, 0)[rank] for p in (mlp.gate_proj, mlp.up_proj)]
        state["layers.0.gate_up.weight"] = take_turns(*gate_up)
        state["layers.0.down.weight"] = pieces(mlp.down_proj.weight.data, tp, 1)[rank]
    return state


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mixtral"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_every_rank_gets_its_part(architecture: str, tied: bool, tp: int, tmp_path: Path) -> None:
    model = make(architecture, tie_word_embeddings=tied)  # 2 kv heads: copied at tp 4 and 8
    save(model, tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    for rank in range(tp):
        loaded = load_rank(tmp_path, rank, tp)
        wanted = expected(model, rank, tp)
        layer_0 = {name for name in loaded if not name.startswith("layers.1")}
        assert layer_0 == wanted.keys() | {"layers.0.rope.frequencies"}
        for name, tensor in wanted.items():
            assert torch.equal(loaded[name], tensor), f"rank {rank} of {tp}: {name}"


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sharded", [False, True])
def test_dtypes_are_converted(stored: torch.dtype, dtype: torch.dtype, sharded: bool, tmp_path: Path) -> None:
    model = make("qwen2")
    save(model, tmp_path, stored, **{"max_shard_size": "60KB"} if sharded else {})
    assert (tmp_path / INDEX).exists() == sharded
    loaded = load_rank(tmp_path, dtype=dtype)
    for name, tensor in expected(model, 0, 1).items():
        assert tensor.dtype == stored
        assert torch.equal(loaded[name], tensor.to(dtype)), name
    assert loaded["layers.0.rope.frequencies"].dtype == torch.float32


def test_tied_embeddings_share_memory_on_one_rank(tmp_path: Path) -> None:
    save(make("llama", tie_word_embeddings=True), tmp_path)
    loaded = load_rank(tmp_path)
    assert loaded["lm_head.weight"].data_ptr() == loaded["embed.weight"].data_ptr()


@pytest.mark.parametrize(
    "extra",
    [
        "model.layers.1.self_attn.rotary_emb.inv_freq",
        "model.layers.1.self_attn.rotary_emb.cos_cached",
        "model.layers.0.self_attn.rotary_emb.sin_cached",
        "model.rotary_emb.inv_freq",
        "model.rotary_emb.original_inv_freq",
    ],
)
def test_harmless_extras_are_passed_over(extra: str, tmp_path: Path) -> None:
    save(make("llama", tie_word_embeddings=True), tmp_path)
    before = load_rank(tmp_path)
    save_file(load_file(tmp_path / SINGLE) | {extra: torch.full((3,), torch.nan)}, tmp_path / SINGLE)
    after = load_rank(tmp_path)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("tp", [1, 2])
def test_an_equal_head_beside_tied_embeddings_is_passed_over(
    tp: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(make("llama", tie_word_embeddings=True), tmp_path)
    before = load_rank(tmp_path, tp - 1, tp)
    state = load_file(tmp_path / SINGLE)
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, tmp_path / SINGLE)
    after = load_rank(tmp_path, tp - 1, tp)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert tp > 1 or after["lm_head.weight"].data_ptr() == after["embed.weight"].data_ptr()
    assert not caplog.records


@pytest.mark.parametrize("tp", [1, 2])
def test_a_tied_head_with_weights_of_its_own_keeps_them(
    tp: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(make("llama", tie_word_embeddings=True), tmp_path)
    state = load_file(tmp_path / SINGLE)
    head = state["model.embed_tokens.weight"].clone()
    head[-1, -1] += 1  # in the last rows that are compared
    save_file(state | {"lm_head.weight": head}, tmp_path / SINGLE)
    for rank in range(tp):
        loaded = load_rank(tmp_path, rank, tp)
        assert torch.equal(loaded["embed.weight"], state["model.embed_tokens.weight"])
        assert torch.equal(loaded["lm_head.weight"], pieces(head, tp, 0)[rank])
    warning = caplog.records[0].getMessage()
    assert all(word in warning for word in [SINGLE, "lm_head.weight differs", "tie_word_embeddings", "both are kept"])


def test_a_tied_head_stands_in_for_embeddings_that_are_not_there(tmp_path: Path) -> None:
    save(make("llama", tie_word_embeddings=True), tmp_path)
    before = load_rank(tmp_path)
    state = load_file(tmp_path / SINGLE)
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    save_file(state, tmp_path / SINGLE)
    after = load_rank(tmp_path)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("tied", [False, True])
def test_heads_of_another_shape_and_absent_embeddings_are_named(tied: bool, tmp_path: Path) -> None:
    save(make("llama", tie_word_embeddings=tied), tmp_path)
    state = load_file(tmp_path / SINGLE)
    save_file(state | {"lm_head.weight": torch.zeros(3)}, tmp_path / SINGLE)
    with pytest.raises(WeightsError, match=r"lm_head\.weight: expected shape \[331, 64\], got \[3\]"):
        load_rank(tmp_path)
    del state["model.embed_tokens.weight"]
    save_file(state, tmp_path / SINGLE)
    with pytest.raises(WeightsError, match=r"model\.embed_tokens\.weight is missing"):
        load_rank(tmp_path)


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


@pytest.mark.parametrize(("shape", "dim"), [((7,), 0), ((5, 3), 0), ((5, 3), 1), ((1, 1), 0), ((2, 12), 1)])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_shards_without_units_add_up_to_the_tensor(shape: tuple[int, ...], dim: int, tp: int) -> None:
    tensor = torch.randn(shape)
    source = Source("x", shape, shard=dim)
    parts = [torch.zeros(local_shape(source, tp)) for _ in range(tp)]
    for rank, part in enumerate(parts):
        shard(tensor, source, rank, tp, out=part)
    whole = torch.cat(parts, dim)
    assert torch.equal(whole.narrow(dim, 0, shape[dim]), tensor)
    assert not whole.narrow(dim, shape[dim], whole.shape[dim] - shape[dim]).any()


def test_fewer_heads_than_ranks_are_copied_to_neighbours() -> None:
    tensor = torch.arange(6.0)[:, None]  # 2 heads of 3 rows
    source = Source("k", (6, 1), shard=0, units=2)
    parts = torch.empty(8, 3, 1)
    for rank in range(8):
        shard(tensor, source, rank, 8, out=parts[rank])
    assert parts[:, 0, 0].tolist() == [0, 0, 0, 0, 3, 3, 3, 3]


def test_a_rank_reads_its_own_slices_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(make("llama", tie_word_embeddings=True), tmp_path)
    read = {"elements": 0}

    class CountingSlice:
        def __init__(self, inner: Any) -> None:
            self.get_shape, self.get_dtype, self.inner = inner.get_shape, inner.get_dtype, inner

        def __getitem__(self, key: Any) -> Tensor:
            part: Tensor = self.inner[key]
            read["elements"] += part.numel()
            return part

    class CountingFile:
        def __init__(self, path: Path, framework: str) -> None:
            self.file = safe_open(path, framework)

        def __enter__(self) -> CountingFile:
            self.entered = self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.__exit__(*error)

        def keys(self) -> list[str]:
            return list(self.entered.keys())

        def get_slice(self, name: str) -> CountingSlice:
            return CountingSlice(self.entered.get_slice(name))

    safe_open = checkpoint.safe_open
    monkeypatch.setattr(checkpoint, "safe_open", CountingFile)
    loaded = load_rank(tmp_path, rank=1, tp=4)
    held = sum(tensor.numel() for name, tensor in loaded.items() if "rope" not in name)
    assert 0.9 * held < read["elements"] <= held


MEMORY_PROBE = """
import resource, sys, torch
from pathlib import Path
from nanoflow_backend.config import ConfigError, ModelConfig
from nanoflow_backend.models.model import build
from nanoflow_backend.models.weights import load

folder, weight_bytes, spare_bytes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
config = ModelConfig.from_pretrained(folder)
model = build(config)
torch.zeros(4) + 1
now = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
limit = now + weight_bytes + spare_bytes
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
print(len(load(folder, config, model, dtype=torch.float32)))
"""


def test_memory_peaks_at_the_weights_and_one_tensor(tmp_path: Path) -> None:
    """The kernel refuses private memory beyond a limit (RLIMIT_DATA; private file maps count): no peak goes unseen."""
    model = make("llama", hidden_size=512, intermediate_size=4096, num_hidden_layers=4, vocab_size=4096)
    save(model, tmp_path, max_shard_size="8MB")
    files = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    assert len(files) >= 12
    assert max(files) < 9e6

    def loads(weight_bytes: int, spare_bytes: int) -> subprocess.CompletedProcess[str]:
        arguments = [sys.executable, "-c", MEMORY_PROBE, str(tmp_path), str(weight_bytes), str(spare_bytes)]
        environment = {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
        return subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)

    total = sum(files)  # 110 MB; one tensor has 8.4 MB at most
    enough = loads(total, 14_000_000)
    assert enough.returncode == 0, enough.stderr[-2000:]
    assert loads(total - 24_000_000, 0).returncode != 0, "the limit must bite"


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
    "empty": (_index_names(""), "expected a file, got something else"),
    "dots": (_index_names(".."), "expected a file, got something else"),
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
