"""The decoder of Llama; other families have it with a bias, a norm or experts.

Shapes: D hidden, H heads, K kv heads, d head_dim, F intermediate, V vocabulary; all but D and V of one rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nanoflow_backend.config.model_config import ModelConfig
from nanoflow_backend.graph.builder import GraphBuilder
from nanoflow_backend.graph.operation import Graph, Source
from nanoflow_backend.models.blocks.attention_kinds import AttentionKind, attention_kinds
from nanoflow_backend.models.blocks.rotary import frequencies, no_rotation
from nanoflow_backend.models.config_json import ConfigJson

EMBEDDINGS = "model.embed_tokens.weight"

Mlp = Callable[[GraphBuilder, ModelConfig, str], str]


def bias_fields(hf: ConfigJson) -> dict[str, Any]:
    """Of classes whose `attention_bias` means all four projections of attention."""
    return dict.fromkeys(("qkv_bias", "o_bias"), hf.flag("attention_bias"))


def decoder_layers(config: ModelConfig, tp: int = 1) -> tuple[Graph, ...]:
    """A graph for each kind of attention."""
    return tuple(layer(config, tp, attention=kind) for kind in attention_kinds(config))


def layer(config: ModelConfig, tp: int = 1, mlp: Mlp | None = None, attention: AttentionKind | None = None) -> Graph:
    """One decoder layer: (residual, update) -> (residual, update); the sum of both is the hidden state.

    `attention`: by default, that of the first layer.
    """
    window, is_rotated = attention or attention_kinds(config)[0]
    g = GraphBuilder(tp, config.quantization, config.scaled_kv)
    residual, update = g.input("residual", config.hidden_size), g.input("update", config.hidden_size)
    batch = g.batch()
    eps, kv_heads = config.rms_norm_eps, -(-config.num_kv_heads // tp)

    residual, x = g.add_rms_norm("attention_norm", residual, update, norm(g, "input_layernorm", config), eps)
    qkv = g.linear("qkv", x, *qkv_parameters(g, config))
    kv_scales = g.kv_scales(*(projection(p, config.num_kv_heads, config) for p in ("k", "v")))
    q, pages = g.rope_append(
        "rope_append",
        qkv,
        batch,
        frequencies(g, config) if is_rotated else no_rotation(g, config),
        kv_heads,
        kv_scales,
        head_norms(g, config),
        head_dim=config.head_dim,
        eps=eps,
        attention_factor=config.rope.attention_factor if is_rotated else 1.0,
    )
    attended = g.attention("attention", q, pages, batch, kv_scales, window)
    update = g.linear("o", attended, *o_parameters(g, config))
    update = g.all_reduce("attention_reduce", update)

    residual, x = g.add_rms_norm("mlp_norm", residual, update, norm(g, "post_attention_layernorm", config), eps)
    update = (mlp or dense_mlp)(g, config, x)
    update = g.all_reduce("mlp_reduce", update)
    return g.build(residual, update)


def dense_mlp(g: GraphBuilder, config: ModelConfig, x: str) -> str:
    """down(silu(gate(x)) * up(x)); gate and up are one matrix, whose rows take turns."""
    hidden, inner = config.hidden_size, config.intermediate_size
    gate = Source("model.layers.{layer}.mlp.gate_proj.weight", (inner, hidden), shard=0)
    up = Source("model.layers.{layer}.mlp.up_proj.weight", (inner, hidden), shard=0)
    down = Source("model.layers.{layer}.mlp.down_proj.weight", (hidden, inner), shard=1)
    h = g.linear_swiglu("gate_up", x, g.weight("gate_up.weight", gate, up, interleave=2))
    return g.linear("down", h, g.weight("down.weight", down))


def embedding(config: ModelConfig) -> Graph:
    """Token ids to the residual stream. Every rank holds the whole table: a gather costs less than its all-reduce."""
    g = GraphBuilder()
    table = g.weight("embed.weight", Source(EMBEDDINGS, (config.vocab_size, config.hidden_size)))
    return g.build(*g.embed("embed", g.input("token_ids", dtype="int32"), table))


def lm_head(config: ModelConfig, tp: int = 1) -> Graph:
    """The rows that are sampled to logits [R, V padded to a multiple of tp], fp32."""
    g = GraphBuilder(tp)
    residual, update = g.input("residual", config.hidden_size), g.input("update", config.hidden_size)
    final_norm = g.weight("norm.weight", Source("model.norm.weight", (config.hidden_size,)))
    shape, tied_to = (config.vocab_size, config.hidden_size), EMBEDDINGS if config.tie_word_embeddings else None
    lm_head = g.weight("lm_head.weight", Source("lm_head.weight", shape, shard=0, tied_to=tied_to))
    _, x = g.add_rms_norm("final_norm", residual, update, final_norm, config.rms_norm_eps)
    logits = g.linear("lm_head", x, lm_head, dtype="float32")
    return g.build(g.all_gather("logits", logits))


def norm(g: GraphBuilder, name: str, config: ModelConfig) -> str:
    return g.weight(f"{name}.weight", Source(f"model.layers.{{layer}}.{name}.weight", (config.hidden_size,)))


def head_norms(g: GraphBuilder, config: ModelConfig) -> tuple[str, ...]:
    """The weights of the norms of Q's and K's heads, if they have norms: one weight for all heads."""
    sources = {
        f"{p}_norm.weight": Source(f"model.layers.{{layer}}.self_attn.{p}_norm.weight", (config.head_dim,))
        for p in ("qk" if config.qk_norm else "")
    }
    return tuple(g.weight(name, source) for name, source in sources.items())


def qkv_parameters(g: GraphBuilder, config: ModelConfig) -> tuple[str, str | None]:
    """Q, K and V as one matrix, cut by whole heads."""

    heads = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
    weight = g.weight("qkv.weight", *(projection(p, n, config) for p, n in heads.items()))
    biases = (projection(p, n, config, is_bias=True) for p, n in heads.items())
    return weight, g.weight("qkv.bias", *biases) if config.qkv_bias else None


def projection(name: str, heads: int, config: ModelConfig, *, is_bias: bool = False) -> Source:
    """The weight or bias of Q, K or V, which ranks share by heads."""
    tensor = f"model.layers.{{layer}}.self_attn.{name}_proj.{'bias' if is_bias else 'weight'}"
    columns = () if is_bias else (config.hidden_size,)
    paired = config.rope.rotated(config.head_dim) if config.rotates_neighbours and name != "v" else 0
    return Source(tensor, (heads * config.head_dim, *columns), shard=0, units=heads, paired=paired)


def o_parameters(g: GraphBuilder, config: ModelConfig) -> tuple[str, str | None]:
    """Of the output projection, which ranks share by heads and then add up."""
    module, shape = "model.layers.{layer}.self_attn.o_proj", (config.hidden_size, config.num_heads * config.head_dim)
    weight = g.weight("o.weight", Source(f"{module}.weight", shape, shard=1, units=config.num_heads))
    bias = Source(f"{module}.bias", shape[:1], once=True)
    return weight, g.weight("o.bias", bias) if config.o_bias else None
