"""Names of roles and dtypes, and the bytes that each takes in everything that is sized by them."""

from __future__ import annotations

import pytest
import torch
from nanoflow_search.cost.model import ModelSize
from nanoflow_search.cost.work import Mix, layer_work
from support.models.shapes import config

from nanoflow_backend.bench.model_work import ModelWork
from nanoflow_backend.config.precision import BFLOAT16, FLOAT32, Precision
from nanoflow_backend.models import weights
from nanoflow_backend.models.model import build

APART = Precision(weights="bfloat16", activations="float32", kv="float16")
CONFIG = config("llama")
MODEL = build(CONFIG)


def test_roles_and_dtypes_have_one_name_space() -> None:
    assert [APART.dtype(name) for name in ("weights", "activations", "kv")] == ["bfloat16", "float32", "float16"]
    assert [APART.dtype(name) for name in ("int32", "float32")] == ["int32", "float32"]


def test_graphs_name_a_role_or_a_dtype_for_every_value() -> None:
    names = {value.dtype for graph in (MODEL.embed, *MODEL.layers, MODEL.head) for value in graph.values.values()}
    assert names == {"activations", "kv", "int32", "float32"}
    assert {parameter.dtype for parameter in MODEL.layer.parameters} == {"weights", "float32"}


@pytest.mark.parametrize("precision", [FLOAT32, BFLOAT16, APART], ids=str)
def test_weights_are_made_in_their_dtype(precision: Precision) -> None:
    made = weights.dummy(MODEL, precision=precision)
    held = {tensor.data_ptr(): tensor.nbytes for tensor in made.values()}
    assert weights.size_bytes(MODEL, precision) == sum(held.values())
    assert made["layers.0.o.weight"].dtype is getattr(torch, precision.weights)


def test_work_and_sizes_count_each_role_in_its_bytes() -> None:
    half, apart = ModelSize.of(CONFIG), ModelSize.of(CONFIG, APART)
    assert (half.weight_bytes, half.activation_bytes, apart.weight_bytes, apart.activation_bytes) == (2, 2, 2, 4)
    assert apart.kv_bytes_per_token == half.kv_bytes_per_token == ModelSize.of(CONFIG, FLOAT32).kv_bytes_per_token / 2
    assert ModelWork.of(MODEL, CONFIG, APART).weight_bytes == ModelWork.of(MODEL, CONFIG, BFLOAT16).weight_bytes
    mix = Mix(8, 0, 1000, 0)
    works = [layer_work(MODEL.layer, mix, precision=p)["attention"].memory_bytes for p in (BFLOAT16, APART, FLOAT32)]
    pages, q = 8 * 1001 * 2 * 2 * 4, 8 * 2 * 8 * 4  # elements: K and V of 2 heads of 4; q and output of 8 heads
    assert works == [2 * (pages + q), 2 * pages + 4 * q, 4 * (pages + q)]
