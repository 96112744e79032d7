"""Weights that become FP8 as they are loaded, or are drawn so: their values, and the memory that it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import save_file
from support.models.loading import load_rank
from support.models.rank_parts import expected
from support.models.shapes import config
from torch import Tensor

from benchmarks.models.checkpoints import make, save
from nanoflow_backend.config.precision import BFLOAT16, FLOAT32, Precision
from nanoflow_backend.config.quantization import AT_LOAD, Quantization
from nanoflow_backend.models import weights
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.models.parameters import wanted_tensors
from nanoflow_backend.models.weights import load

QUANTISED = ("qkv", "o", "gate_up", "down")


def quantised(folder: Path, rank: int, tp: int, precision: Precision = FLOAT32) -> dict[str, Tensor]:
    config = replace(read_model_config(folder), quantization=AT_LOAD)
    return load(folder, config, build(config, tp), rank=rank, tp=tp, precision=precision)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mixtral", "glm"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_rank_quantises_its_part(
    architecture: str, stored: torch.dtype, tp: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "CHUNK_ELEMENTS", 7 * 64)  # many chunks, and a last one that is shorter
    model = make(architecture)
    save(model, tmp_path, stored)
    for rank in range(tp):
        loaded, plain = quantised(tmp_path, rank, tp), load_rank(tmp_path, rank, tp)
        for name, part in expected(model, rank, tp).items():
            if name.removeprefix("layers.0.").removesuffix(".weight") not in QUANTISED:
                assert torch.equal(loaded[name], plain[name]), name
                continue
            largest = part.double().abs().amax(-1)
            scale = loaded[f"{name}.scale"].double()
            assert loaded[name].dtype == torch.float8_e4m3fn
            assert torch.allclose(scale[largest > 0], largest[largest > 0] / 448, rtol=1e-6), name
            error = (loaded[name].double() * scale[..., None] - part.double()).abs()
            assert (error <= part.double().abs() / 16 + scale[..., None] * 2**-10).all(), name
            assert error.any()


def test_tied_embeddings_stay_as_they_are(tmp_path: Path) -> None:
    save(make("llama", tie_word_embeddings=True), tmp_path)
    loaded = quantised(tmp_path, 0, 1, BFLOAT16)
    assert loaded["lm_head.weight"].data_ptr() == loaded["embed.weight"].data_ptr()
    assert loaded["embed.weight"].dtype == torch.bfloat16
    assert len({loaded[f"layers.{i}.{name}.weight.scale"].data_ptr() for i in range(2) for name in QUANTISED}) == 8


BLOCKS = Quantization(method="fp8", weights="block", activations="group", weight_scale="weight_scale_inv")
STATIC = Quantization(method="modelopt", weights="tensor", activations="static")
WIDE = {"hidden_size": 256, "intermediate_size": 384, "num_heads": 8, "num_kv_heads": 4, "head_dim": 32}


@pytest.mark.parametrize(
    ("architecture", "quantization"),
    [("llama", AT_LOAD), ("mixtral", AT_LOAD), ("llama", STATIC), ("llama", BLOCKS)],
)
def test_weights_are_drawn_in_fp8(
    architecture: str, quantization: Quantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "CHUNK_ELEMENTS", 1000)
    model = build(replace(config(architecture, **WIDE), quantization=quantization, scaled_kv=True))
    made, again = (weights.dummy(model, precision=BFLOAT16, seed=3) for _ in range(2))
    held = {tensor.data_ptr(): tensor.nbytes for tensor in made.values()}
    assert weights.size_bytes(model, BFLOAT16) == sum(held.values())
    for name in QUANTISED:
        weight, scale = made[f"layers.1.{name}.weight"], made[f"layers.1.{name}.weight.scale"]
        assert torch.equal(weight.float(), again[f"layers.1.{name}.weight"].float())
        in_blocks = quantization is BLOCKS
        by_row = scale.repeat_interleave(128, 0).repeat_interleave(128, 1) if in_blocks else scale[..., None]
        values = weight.float() * by_row
        assert 0.0195 < values.std() < 0.0205
        assert (scale > 0).all()
        assert weight.float().abs().max() == 448
    assert made["layers.1.kv.scales"].tolist() == [1, 1]
    assert made["embed.weight"].dtype == torch.bfloat16
    if quantization is STATIC:
        assert made["layers.0.qkv.weight.input_scale"].item() > 0


MEMORY_PROBE = """
import resource, sys, torch
from pathlib import Path
from msgspec.structs import replace
from nanoflow_backend.config.precision import BFLOAT16
from nanoflow_backend.config.quantization import AT_LOAD
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.models.weights import load, size_bytes

folder, spare_bytes = Path(sys.argv[1]), int(sys.argv[2])
config = replace(read_model_config(folder), quantization=AT_LOAD)
model = build(config)
(torch.zeros(512, 512) + 1).to(torch.float8_e4m3fn).float().abs().amax(-1)
now = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
limit = now + size_bytes(model, BFLOAT16) + spare_bytes
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
print(len(load(folder, config, model, precision=BFLOAT16)))
"""


def test_memory_peaks_at_the_quantised_weights_and_a_few_rows(tmp_path: Path) -> None:
    """The kernel refuses private memory beyond a limit (RLIMIT_DATA; private file maps count): no peak goes unseen."""
    save(make("llama", hidden_size=256, num_hidden_layers=1), tmp_path)
    of_one = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(of_one | {"intermediate_size": 4096, "num_hidden_layers": 12}))
    (tmp_path / "model.safetensors").unlink()
    names = {}
    for name, (source, _) in wanted_tensors(build(read_model_config(tmp_path)), None).items():
        save_file({name: torch.full(source.shape, 0.02, dtype=torch.bfloat16)}, tmp_path / f"{name}.safetensors")
        names[name] = f"{name}.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    largest_file = max(path.stat().st_size for path in tmp_path.glob("*.safetensors"))

    def loads(spare_bytes: int) -> subprocess.CompletedProcess[str]:
        arguments = [sys.executable, "-c", MEMORY_PROBE, str(tmp_path), str(spare_bytes)]
        environment = {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}  # what is freed goes back at once
        return subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)

    # 39 MB of weights; a chunk takes 2 MB: less than a twentieth of any model that is not tiny.
    with ThreadPoolExecutor() as threads:
        enough, too_little = threads.map(loads, (largest_file + 3_500_000, -4_000_000))
    assert enough.returncode == 0, enough.stderr[-2000:]
    assert too_little.returncode != 0, "the limit must bite"
