"""The models whose shapes benchmarks have: their published sizes, and that they are computed in FP8 as a whole."""

import pytest
from msgspec.structs import replace
from nanoflow_search.cost.model import ModelSize
from support.places import MODELS

from nanoflow_backend.bench.model_work import ModelWork
from nanoflow_backend.config.precision import BFLOAT16
from nanoflow_backend.config.quantization import AT_LOAD
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build

PARAMETERS = {
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "qwen2-72b": 72_706_203_648,
    "deepseek-67b": 67_425_001_472,
    "mixtral-8x7b": 46_702_792_704,
}


def test_every_folder_has_its_published_size():
    folders = {path.parent.name: read_model_config(path.parent) for path in MODELS.glob("*/config.json")}
    assert {name: ModelSize.of(config).parameters for name, config in folders.items()} == PARAMETERS


@pytest.mark.parametrize("name", PARAMETERS)
def test_all_but_embedding_router_head_and_norms_is_in_fp8(name):
    config = replace(read_model_config(MODELS / name), quantization=AT_LOAD)
    size = ModelSize.of(config)
    rest = 2 * config.vocab_size * config.hidden_size + (2 * config.num_layers + 1) * config.hidden_size
    rest += config.num_layers * config.num_experts * config.hidden_size
    if config.qkv_bias:
        rest += config.num_layers * (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    assert size.weight_bytes * size.parameters == size.parameters + rest
    assert size.weight_bytes * size.parameters < 80e9, "one GPU of 141 GB holds it, and a KV cache"
    work = ModelWork.of(build(config), config, BFLOAT16)
    router = 2 * config.num_layers * config.num_experts * config.hidden_size
    assert work.linear_flop_per_token - work.fp8_flop_per_token == router
