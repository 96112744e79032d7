"""FP8 checkpoints that tools made (see made_with.json in each folder), and copies that differ in something."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

FOLDER = Path(__file__).parent / "fp8"
NAMES = sorted(path.name for path in FOLDER.iterdir())
SINGLE = "model.safetensors"


def tensors(name: str) -> dict[str, Tensor]:
    """All of a checkpoint, by its own names."""
    return load_file(FOLDER / name / SINGLE)


def changed(name: str, to: Path, state: Mapping[str, Tensor | None], config: Mapping[str, Any] | None = None) -> Path:
    """A copy in the folder `to` with other tensors (None: without this one) and other keys of quantization_config."""
    kept = {key: tensor for key, tensor in (tensors(name) | state).items() if tensor is not None}
    save_file({key: tensor.contiguous() for key, tensor in kept.items()}, to / SINGLE)
    read = json.loads((FOLDER / name / "config.json").read_text())
    read["quantization_config"] |= config or {}
    (to / "config.json").write_text(json.dumps(read))
    return to
