"""Checkpoints that transformers saved, as every rank should hold them; broken ones, and what is said about them."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models.loading import load_rank
from support.models.rank_parts import expected, pieces
from torch import Tensor

from benchmarks.models.checkpoints import make, save
from nanoflow_backend.config.precision import Dtype
from nanoflow_backend.graph.builder import local_shape
from nanoflow_backend.graph.operation import Source
from nanoflow_backend.models import checkpoint
from nanoflow_backend.models.checkpoint import WeightsError
from nanoflow_backend.models.placement import put, shard

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.mark.parametrize(
    "architecture", ["llama", "qwen2", "qwen3_moe", "mixtral", "phi3", "seed_oss", "glm", "ernie4_5"]
)
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
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("sharded", [False, True])
def test_dtypes_are_converted(stored: torch.dtype, dtype: Dtype, sharded: bool, tmp_path: Path) -> None:
    model = make("qwen2")
    save(model, tmp_path, stored, **{"max_shard_size": "60KB"} if sharded else {})
    assert (tmp_path / INDEX).exists() == sharded
    loaded = load_rank(tmp_path, dtype=dtype)
    for name, tensor in expected(model, 0, 1).items():
        assert tensor.dtype == stored
        assert torch.equal(loaded[name], tensor.to(getattr(torch, dtype))), name
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


@pytest.mark.parametrize(("shape", "dim"), [((7,), 0), ((5, 3), 0), ((5, 3), 1), ((1, 1), 0), ((2, 12), 1)])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_shards_without_units_add_up_to_the_tensor(shape: tuple[int, ...], dim: int, tp: int) -> None:
    tensor = torch.randn(shape)
    source = Source("x", shape, shard=dim)
    parts = [torch.zeros(local_shape(source, tp)) for _ in range(tp)]
    for rank, part in enumerate(parts):
        put(shard(tensor, source, rank, tp), part[:, None])
    whole = torch.cat(parts, dim)
    assert torch.equal(whole.narrow(dim, 0, shape[dim]), tensor)
    assert not whole.narrow(dim, shape[dim], whole.shape[dim] - shape[dim]).any()


def test_fewer_heads_than_ranks_are_copied_to_neighbours() -> None:
    tensor = torch.arange(6.0)[:, None]  # 2 heads of 3 rows
    source = Source("k", (6, 1), shard=0, units=2)
    parts = torch.empty(8, 3, 1)
    for rank in range(8):
        put(shard(tensor, source, rank, 8), parts[rank][:, None])
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
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.models.weights import load

folder, weight_bytes, spare_bytes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
config = read_model_config(folder)
model = build(config)
torch.zeros(4) + 1
now = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
limit = now + weight_bytes + spare_bytes
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
print(len(load(folder, config, model)))
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
    with ThreadPoolExecutor() as threads:
        enough, too_little = threads.map(loads, (total, total - 24_000_000), (14_000_000, 0))
    assert enough.returncode == 0, enough.stderr[-2000:]
    assert too_little.returncode != 0, "the limit must bite"
