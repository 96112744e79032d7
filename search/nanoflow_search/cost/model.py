"""CostModel: what bounds a model's throughput on a machine (paper section 3, Eq. 1-5), with power as fourth resource.

All rates are of the whole tensor-parallel group, all times of one iteration: B_dense tokens through every layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from nanoflow_backend.config.model_config import ModelConfig
from nanoflow_backend.config.precision import BFLOAT16, Precision
from nanoflow_backend.graph.operation import Graph, Resource
from nanoflow_backend.models.model import build
from nanoflow_search.cost.devices import Device
from nanoflow_search.cost.work import Mix, Work


@dataclass(frozen=True)
class Workload:
    """Mean tokens of a request: p of its prompt, d of its output."""

    prompt_tokens: float
    output_tokens: float

    @classmethod
    def parse(cls, text: str) -> Workload:
        """Read "1024/512". Raises: ValueError, saying what was expected."""
        prompt, _, output = text.partition("/")
        if not (prompt.isdecimal() and output.isdecimal() and int(prompt) and int(output)):
            raise ValueError(f"workload: expected PROMPT/OUTPUT tokens such as 1024/512, got {text!r}")
        return cls(int(prompt), int(output))

    @property
    def decode_share(self) -> float:
        """d / (p + d): the part of an iteration's tokens that decode, once the mix is stationary."""
        return self.output_tokens / (self.prompt_tokens + self.output_tokens)

    @property
    def context_tokens(self) -> float:
        """p + d/2: what a decoding request holds, on average over its life."""
        return self.prompt_tokens + self.output_tokens / 2

    def mix(self, dense_batch_tokens: float) -> Mix:
        decode = dense_batch_tokens * self.decode_share
        return Mix(decode, dense_batch_tokens - decode, self.context_tokens, self.prompt_tokens)

    def steady_mix(self, dense_batch_tokens: float) -> Mix:
        """As an engine's kernels see it: causal, so that a prompt's tokens see half of it on average.

        The paper's estimates (`mix`) count all of it.
        """
        return replace(self.mix(dense_batch_tokens), prefill_context=self.prompt_tokens / 2)


@dataclass(frozen=True)
class ModelSize:
    """What Eq. 1-5 know of a model."""

    parameters: float  # P_model, that fill memory
    active_parameters: float  # that a token meets: fewer with experts
    hidden: int  # D_model
    layers: int
    kv_bytes_per_token: float
    weight_bytes: int = 2  # S_type of one parameter
    activation_bytes: int = 2  # S_type of one activation

    @classmethod
    def of(cls, config: ModelConfig, precision: Precision = BFLOAT16) -> ModelSize:
        model = build(config)
        layers = sum(map(_parameters, model.in_order))
        rest = _parameters(model.embed) + _parameters(model.head)
        if config.tie_word_embeddings:
            rest -= config.vocab_size * config.hidden_size
        idle = 1 - config.experts_per_token / config.num_experts if config.num_experts else 0.0
        experts = sum(prod(p.shape) for graph in model.in_order for p in graph.parameters if len(p.shape) == 3)
        total = layers + rest
        kv_elements = 2 * config.num_kv_heads * config.head_dim * config.num_layers
        return cls(
            parameters=total,
            active_parameters=total - idle * experts,
            hidden=config.hidden_size,
            layers=config.num_layers,
            kv_bytes_per_token=kv_elements * precision.element_bytes("kv"),
            weight_bytes=precision.element_bytes("weights"),
            activation_bytes=precision.element_bytes("activations"),
        )


def _parameters(graph: Graph) -> int:
    return sum(prod(p.shape) for p in graph.parameters if p.constant is None)


@dataclass(frozen=True)
class CostModel:
    """Eq. 1-5 for `gpus` devices that share a model by tensor parallelism."""

    model: ModelSize
    device: Device
    gpus: int = 1

    def memory_s(self) -> float:
        """T_mem (Eq. 1): with a full cache an iteration reads all of the memory once."""
        return self.device.memory_bytes / self.device.memory_bytes_per_s

    def compute_s(self, dense_batch_tokens: float) -> float:
        """T_compute (Eq. 2)."""
        return 2 * dense_batch_tokens * self.model.active_parameters / (self.gpus * self.device.flop_per_s)

    def network_s(self, dense_batch_tokens: float) -> float:
        """T_net (Eq. 3): two all-reduces a layer, or what they are made of.

        The paper prints the limit of many GPUs; its figures have the factor (N - 1) / N of a ring, and one-way rates.
        """
        model = self.model
        sent = 4 * (self.gpus - 1) * dense_batch_tokens * model.hidden * model.activation_bytes * model.layers
        return sent / (self.gpus * self.device.network_bytes_per_s)

    def dense_batch_tokens(self, workload: Workload) -> float:
        """B_dense where the cache is full: its requests' decode tokens, and prompts at the rate they end."""
        free = self.gpus * self.device.memory_bytes - self.model.parameters * self.model.weight_bytes
        if free <= 0:
            raise ValueError(
                f"{self.model.parameters / 1e9:.1f}e9 parameters do not fit in {self.gpus} x {self.device.name}"
            )
        requests = free / self.model.kv_bytes_per_token / workload.context_tokens
        return requests / workload.decode_share

    def memory_to_compute(self, workload: Workload) -> float:
        """T_R (Eq. 4): below 1 the workload is bound by compute."""
        return self.memory_s() / self.compute_s(self.dense_batch_tokens(workload))

    def optimal_tokens_per_s(self) -> float:
        """Eq. 5, of all GPUs; prompt and output tokens. Divide by the GPUs to compare with the paper."""
        return self.gpus * self.device.flop_per_s / (2 * self.model.active_parameters)


@dataclass(frozen=True)
class Roofs:
    """The shortest times of one iteration's layers, by resource, if each were all that there is. Of one rank.

    `power_s` is the time in which the cap lets the dynamic energy through, beside the static power.
    """

    compute_s: float
    memory_s: float
    network_s: float
    power_s: float | None

    @property
    def sequential_s(self) -> float:
        """One resource after the other, within the cap."""
        return max(self.compute_s + self.memory_s + self.network_s, self.power_s or 0.0)

    @property
    def overlapped_s(self) -> float:
        """Everything hidden behind the scarcest."""
        return max(self.compute_s, self.memory_s, self.network_s, self.power_s or 0.0)

    @property
    def bound(self) -> str:
        times = {"compute": self.compute_s, "memory": self.memory_s, "network": self.network_s}
        times |= {"power": self.power_s} if self.power_s is not None else {}
        return max(times, key=times.__getitem__)


def roofs(graph: Graph, works: Mapping[str, Work], device: Device, layers: int = 1) -> Roofs:
    """From the work of each operation of a layer: each takes the resource it is tagged with, alone, at full rate."""

    def total(resource: Resource, seconds: dict[str, float]) -> float:
        return layers * sum(seconds[op.name] for op in graph.operations if op.resource is resource)

    compute = {name: work.flop / device.flop_per_s for name, work in works.items()}
    memory = {name: work.memory_bytes / device.memory_bytes_per_s for name, work in works.items()}
    network = {name: work.network_bytes / device.network_bytes_per_s for name, work in works.items()}
    power_s = None
    if device.power:
        dynamic_j = layers * sum(dynamic_energy_j(graph[name].resource, work, device) for name, work in works.items())
        power_s = dynamic_j / (device.power.cap_w - device.power.static_w)
    return Roofs(
        total(Resource.COMPUTE, compute), total(Resource.MEMORY, memory), total(Resource.NETWORK, network), power_s
    )


def dynamic_energy_j(resource: Resource, work: Work, device: Device) -> float:
    """Beyond static power. Raises: ValueError, the device's energies are not known."""
    power = device.power
    if power is None:
        raise ValueError(f"{device.name}: no energies are known of it")
    match resource:
        case Resource.COMPUTE:
            return work.flop * power.j_per_flop
        case Resource.MEMORY:
            return work.memory_bytes * power.j_per_byte
        case Resource.NETWORK:
            return work.network_bytes * power.j_per_network_byte
