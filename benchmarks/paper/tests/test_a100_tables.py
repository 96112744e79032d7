"""The published tables as a profile."""

from pathlib import Path

import pytest

from benchmarks.paper import a100_tables as a100
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build

MODELS = Path(__file__).parents[2] / "models"


def test_the_papers_table_follows_from_times() -> None:
    layer = build(read_model_config(MODELS / "llama-2-70b"), 8).layer
    profile = a100.profile(layer, 8, a100.LLAMA_2_70B_TP8)
    found = a100.resource_to_performance(profile, "attention/decode", 1000 * a100.CONTEXT)
    assert found[round(0.4 * 108) / 108] == pytest.approx(0.8)
    assert list(found.values()) == pytest.approx(list(a100.PUBLISHED["attention"].values()))
    surface = profile.surface("gate_up")
    assert surface.duration_us(640) == pytest.approx(287)
    assert surface.duration_us(1408, 54) == pytest.approx(2 * 587)
