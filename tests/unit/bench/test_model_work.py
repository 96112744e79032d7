"""What a forward pass costs, against the published sizes of models and counts by hand."""

import pytest
from support.models import shapes
from support.places import LLAMA_3_8B

from nanoflow_backend.bench.model_work import ModelWork
from nanoflow_backend.config.precision import BFLOAT16, FLOAT32
from nanoflow_backend.models.hugging_face import from_hf, read_model_config
from nanoflow_backend.models.model import build


def test_llama_3_8b_has_its_published_size():
    config = read_model_config(LLAMA_3_8B)
    work = ModelWork.of(build(config), config, BFLOAT16)
    assert work.parameters == 8_030_261_248
    embedding, norms = 128_256 * 4096, 65 * 4096
    assert work.weight_bytes == work.token_weight_bytes == 2 * (work.parameters - embedding - norms)
    assert work.linear_flop_per_token + work.head_flop_per_row == work.weight_bytes  # 2 FLOPs and 2 bytes an element
    assert work.kv_bytes_per_token == 32 * 2 * 8 * 128 * 2
    assert work.attention_flop_per_pair == 32 * 32 * 128 * 4  # 32 heads: a dot product and a sum, of 128


def test_a_mixture_uses_some_of_its_experts():
    config = from_hf(
        {
            "architectures": ["MixtralForCausalLM"],
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_hidden_layers": 32,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "vocab_size": 32000,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 32768,
            "torch_dtype": "bfloat16",
        },
        {},
    )
    work = ModelWork.of(build(config), config, BFLOAT16)
    idle_experts = 6 * 3 * 4096 * 14336 * 32
    assert work.parameters == 46_702_792_704 - idle_experts  # the checkpoint's size, from its card
    assert work.weight_bytes - work.token_weight_bytes == 2 * idle_experts


@pytest.mark.parametrize("architecture", shapes.WITH_NORMS)
def test_two_ranks_share_the_work(architecture):
    config = shapes.config(architecture, intermediate_size=38, vocab_size=68)
    one, two = (ModelWork.of(build(config, ranks), config, FLOAT32) for ranks in (1, 2))
    assert two.parameters == one.parameters
    assert two.attention_flop_per_pair * 2 == one.attention_flop_per_pair
    assert two.kv_bytes_per_token * 2 == one.kv_bytes_per_token
    router = 2 * 3 * 8 * 16 if config.num_experts else 0  # every rank has all of it
    assert 2 * two.linear_flop_per_token - router == one.linear_flop_per_token
