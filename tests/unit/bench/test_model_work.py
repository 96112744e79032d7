"""What a forward pass costs, against the published sizes of models and counts by hand."""

import pytest
from msgspec.structs import replace
from support.models import shapes
from support.places import LLAMA_3_8B

from nanoflow_backend.bench.model_work import ModelWork
from nanoflow_backend.config.precision import BFLOAT16, FLOAT32, Precision
from nanoflow_backend.config.quantization import AT_LOAD, FP8
from nanoflow_backend.models.hugging_face import from_hf, read_model_config
from nanoflow_backend.models.model import build

FP8_KV = Precision(weights="bfloat16", activations="bfloat16", kv=FP8)


def test_llama_3_8b_has_its_published_size():
    config = read_model_config(LLAMA_3_8B)
    work = ModelWork.of(build(config), config, BFLOAT16)
    assert work.parameters == 8_030_261_248
    embedding, norms = 128_256 * 4096, 65 * 4096
    assert work.weight_bytes == work.token_weight_bytes == 2 * (work.parameters - embedding - norms)
    assert work.linear_flop_per_token + work.head_flop_per_row == work.weight_bytes  # 2 FLOPs and 2 bytes an element
    assert work.kv_bytes_per_token == 32 * 2 * 8 * 128 * 2
    assert work.attention_flop_per_pair == 32 * 32 * 128 * 4  # 32 heads: a dot product and a sum, of 128


def test_in_fp8_products_of_layers_and_pages_take_a_byte_an_element():
    config = replace(read_model_config(LLAMA_3_8B), quantization=AT_LOAD, scaled_kv=True)
    work = ModelWork.of(build(config), config, FP8_KV)
    layers, head = 32 * 4096 * (6144 + 4096 + 3 * 14336), 128_256 * 4096
    assert (work.parameters, work.fp8_parameters) == (8_030_261_248, layers)
    assert work.linear_flop_per_token == work.fp8_flop_per_token == 2 * layers
    assert work.head_flop_per_row == 2 * head
    assert work.weight_bytes == work.token_weight_bytes == layers + 2 * head
    assert work.kv_bytes_per_token == 32 * 2 * 8 * 128


def test_what_a_quantization_leaves_out_stays_as_it_is():
    config = replace(read_model_config(LLAMA_3_8B), quantization=replace(AT_LOAD, excluded=(r"re:.*\.0\.mlp\.",)))
    work = ModelWork.of(build(config), config, BFLOAT16)
    mlp, covered = 3 * 4096 * 14336, 4096 * (31 * 3 * 14336 + 32 * (6144 + 4096))
    assert work.fp8_flop_per_token == 2 * covered
    assert work.linear_flop_per_token == 2 * (covered + mlp)
    assert work.weight_bytes == covered + 2 * (mlp + 128_256 * 4096)


def test_the_optimum_counts_each_kind_of_product_at_its_rate():
    config = read_model_config(LLAMA_3_8B)
    work = ModelWork.of(build(config), config, BFLOAT16)
    assert work.optimal_tokens_per_s(667e12) == pytest.approx(667e12 / (2 * 8_030_261_248))
    mixed = replace(work, fp8_parameters=6_000_000_000)
    a_token_s = 2 * 2_030_261_248 / 667e12 + 2 * 6_000_000_000 / 1261e12
    assert mixed.optimal_tokens_per_s(667e12, 1261e12) == pytest.approx(1 / a_token_s)


MIXTRAL = from_hf(
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
IDLE_EXPERTS = 6 * 3 * 4096 * 14336 * 32


def test_a_mixture_uses_some_of_its_experts():
    work = ModelWork.of(build(MIXTRAL), MIXTRAL, BFLOAT16)
    assert work.parameters == 46_702_792_704 - IDLE_EXPERTS  # the checkpoint's size, from its card
    assert work.weight_bytes - work.token_weight_bytes == 2 * IDLE_EXPERTS


def test_the_experts_of_a_mixture_are_in_fp8_and_its_router_is_not():
    config = replace(MIXTRAL, quantization=AT_LOAD)
    work, plain = (ModelWork.of(build(c), c, BFLOAT16) for c in (config, MIXTRAL))
    assert work.linear_flop_per_token == plain.linear_flop_per_token
    assert work.linear_flop_per_token - work.fp8_flop_per_token == 2 * 32 * 8 * 4096
    assert work.weight_bytes - work.token_weight_bytes == IDLE_EXPERTS


@pytest.mark.parametrize("architecture", shapes.CONFIGS)
def test_two_ranks_share_the_work(architecture):
    config = shapes.config(architecture, intermediate_size=38, vocab_size=68)
    one, two = (ModelWork.of(build(config, ranks), config, FLOAT32) for ranks in (1, 2))
    assert two.parameters == one.parameters
    assert two.attention_flop_per_pair * 2 == one.attention_flop_per_pair
    assert two.kv_bytes_per_token * 2 == one.kv_bytes_per_token
    router = 2 * 3 * 8 * 16 if architecture == "mixtral" else 0  # every rank has all of it
    assert 2 * two.linear_flop_per_token - router == one.linear_flop_per_token
