"""A folder's weights as the engine loads them."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from nanoflow_backend.config.precision import Dtype, Precision
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.models.weights import load


def load_rank(folder: Path, rank: int = 0, tp: int = 1, dtype: Dtype = "float32") -> dict[str, Tensor]:
    """What one rank out of `tp` holds."""
    config = read_model_config(folder)
    return load(folder, config, build(config, tp), rank=rank, tp=tp, precision=Precision.of(dtype))
