"""The cost model says what bounds a model's throughput on a machine: Eq. 1-5 of NanoFlow, section 3.

Rates are those of the whole tensor-parallel group. Times are those of one iteration: B_dense tokens through all layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from nanoflow_backend.config.model_config import ModelConfig
from nanoflow_backend.config.precision import BFLOAT16, Precision
from nanoflow_backend.config.quantization import FP8
from nanoflow_backend.models.model import build
from nanoflow_search.cost.devices import GpuSpec
from nanoflow_search.cost.workload import MeanWorkload


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a model that Eq. 1-5 need."""

    parameters: float  # P_model: all that fill memory
    active_parameters: float  # those that one token is multiplied with: fewer than all where there are experts
    hidden: int  # D_model
    layers: int
    kv_bytes_per_token: float  # of all layers
    weight_bytes: float = 2  # S_type of one parameter, on average
    activation_bytes: int = 2  # S_type of one activation
    fp8_share: float = 0.0  # of the active parameters, those in products of e4m3 operands

    @classmethod
    def of(cls, config: ModelConfig, precision: Precision = BFLOAT16) -> ModelSize:
        """Count the parameters of the model's op graphs; tied embeddings count once, scales and constants do not."""
        model = build(config)
        held = [
            parameter
            for graph in (model.embed, *model.in_order, model.head)
            for parameter in graph.parameters
            if parameter.constant is None and parameter.scale is None
        ]
        used = config.experts_per_token / config.num_experts if config.num_experts else 1.0
        active = {True: 0.0, False: 0.0}  # by whether they are e4m3
        total = total_bytes = 0
        for parameter in held:
            elements = prod(parameter.shape)
            total += elements
            total_bytes += elements * precision.element_bytes(parameter.dtype)
            active[parameter.dtype == FP8] += elements * (used if len(parameter.shape) == 3 else 1.0)
        if config.tie_word_embeddings:
            twice = config.vocab_size * config.hidden_size
            total, total_bytes = total - twice, total_bytes - twice * precision.element_bytes("weights")
            active[False] -= twice
        kv_elements = 2 * config.num_kv_heads * config.head_dim * config.num_layers
        return cls(
            parameters=total,
            active_parameters=sum(active.values()),
            hidden=config.hidden_size,
            layers=config.num_layers,
            kv_bytes_per_token=kv_elements * precision.element_bytes("kv"),
            weight_bytes=total_bytes / total,
            activation_bytes=precision.element_bytes("activations"),
            fp8_share=active[True] / sum(active.values()),
        )


@dataclass(frozen=True)
class CostModel:
    """Eq. 1-5 for `gpus` equal devices that share a model by tensor parallelism."""

    model: ModelSize
    device: GpuSpec
    gpus: int = 1

    def memory_s(self) -> float:
        """T_mem (Eq. 1), in seconds: with a full KV cache an iteration reads all of the memory once."""
        return self.device.memory_bytes / self.device.memory_bytes_per_s

    def compute_s(self, dense_batch_tokens: float) -> float:
        """T_compute (Eq. 2), in seconds: two operations for each token and active parameter, each kind at its rate.

        Raises:
            ValueError: the device has no products of FP8 operands.
        """
        flop, fp8_share = 2 * dense_batch_tokens * self.model.active_parameters, self.model.fp8_share
        return self.device.compute_s(flop * (1 - fp8_share), flop * fp8_share) / self.gpus

    def network_s(self, dense_batch_tokens: float) -> float:
        """T_net (Eq. 3), in seconds: two all-reduces a layer, or the reduce-scatter and all-gather that make them up.

        The paper prints the limit for many GPUs; its figures have the factor (N - 1) / N of a ring, as here.
        """
        model = self.model
        sent = 4 * (self.gpus - 1) * dense_batch_tokens * model.hidden * model.activation_bytes * model.layers
        return sent / (self.gpus * self.device.network_bytes_per_s)

    def dense_batch_tokens(self, workload: MeanWorkload) -> float:
        """B_dense in steady state: the KV cache is full, and arrivals match completions.

        Raises:
            ValueError: the weights do not fit in the memory.
        """
        free = self.gpus * self.device.memory_bytes - self.model.parameters * self.model.weight_bytes
        if free <= 0:
            raise ValueError(
                f"{self.model.parameters / 1e9:.1f}e9 parameters do not fit in {self.gpus} x {self.device.name}"
            )
        requests = free / self.model.kv_bytes_per_token / workload.context_tokens
        return requests / workload.decode_share

    def memory_to_compute(self, dense_batch_tokens: float) -> float:
        """T_R (Eq. 4) = T_mem / T_compute: below 1 compute is the bound."""
        return self.memory_s() / self.compute_s(dense_batch_tokens)

    def optimal_tokens_per_s(self) -> float:
        """Eq. 5: prompt and output tokens per second of all GPUs together, if compute never waits.

        The paper's figures are per GPU: divide by `gpus` to compare.
        """
        return 1 / self.compute_s(1)
