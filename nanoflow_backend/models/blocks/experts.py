"""A mixture of experts: the top k of E small MLPs for each token. Tensor parallelism cuts every expert (section 6.7).

Shapes: D hidden, E experts, F moe_intermediate_size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from nanoflow_backend.config.model_config import ModelConfig
from nanoflow_backend.graph.builder import GraphBuilder
from nanoflow_backend.graph.operation import Source
from nanoflow_backend.models.config_json import MOST_REPEATS, ConfigJson


class ExpertNames(NamedTuple):
    """What a checkpoint calls the modules."""

    block: str
    gate: str  # of an expert: down(silu(gate(x)) * up(x))
    up: str
    down: str

    def expert(self, module: str, expert: int | str = "{expert}") -> str:
        return f"model.layers.{{layer}}.{self.block}.experts.{expert}.{module}.weight"

    @property
    def router(self) -> str:
        return f"model.layers.{{layer}}.{self.block}.gate.weight"

    @property
    def fused(self) -> dict[str, tuple[str, ...]]:
        """As transformers 5 has a layer in memory, and saves it with `save_original_format=False`."""
        mlp = "model.layers.{layer}.mlp"
        return {
            f"{mlp}.experts.gate_up_proj": (self.expert(self.gate), self.expert(self.up)),  # [E, 2 F, D]
            f"{mlp}.experts.down_proj": (self.expert(self.down),),  # [E, D, F]
            f"{mlp}.gate.weight": (self.router,),
        }


def config_fields(hf: ConfigJson) -> dict[str, Any]:
    """The classes know both names of the number of experts: 4.x reads the one that 5.x writes, and the other way."""
    experts = hf.agreed("num_local_experts", "num_experts")
    return {
        "num_experts": hf.integer("num_local_experts", experts, 1, MOST_REPEATS),
        "experts_per_token": hf.size("num_experts_per_tok"),
    }


def expert_mlp(g: GraphBuilder, config: ModelConfig, x: str, names: ExpertNames) -> str:
    """sum over the chosen experts e of weight_e * down_e(silu(gate_e(x)) * up_e(x))."""
    count, hidden, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
    gates_ups = [
        Source(names.expert(module, e), (inner, hidden), shard=0)
        for e in range(count)
        for module in (names.gate, names.up)
    ]
    downs = [Source(names.expert(names.down, e), (hidden, inner), shard=1) for e in range(count)]
    router = g.weight("router.weight", Source(names.router, (count, hidden)))

    logits = g.linear("router", x, router, dtype="float32", quantise=False)
    chosen, weights = g.route("route", logits, config.experts_per_token, config.norm_topk_prob)
    gate_up = g.weight("gate_up.weight", *gates_ups, interleave=2, matrices=count)
    h = g.grouped_linear_swiglu("gate_up", x, chosen, gate_up)
    return g.grouped_combine("down", h, chosen, weights, g.weight("down.weight", *downs, matrices=count))
