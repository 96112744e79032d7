"""EngineConfig is engine.json, field for field; SettledConfig is the same on its device."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.file import convert, parse_json, read_json
from nanoflow_backend.config.kv_events import KvEventsConfig
from nanoflow_backend.config.precision import Dtype, Precision
from nanoflow_backend.config.quantization import FP8
from nanoflow_backend.config.rules import PATH, Rule, broken, one_of, split_address, whole

TOKENS = whole(1, or_null=True)
BYTES = whole(0, 2**53)
RULES = {  # of engine.json, beyond the types of its fields
    "model": PATH,
    "schedule": PATH,
    "schedule_workload": Rule(
        "PROMPT/OUTPUT tokens such as 1024/512",
        lambda value: re.fullmatch(r"[1-9]\d{0,8}/[1-9]\d{0,8}", value, re.ASCII) is not None,
    ),
    "schedule_cache": PATH,
    "python": PATH,
    "tensor_parallel": one_of(1, 2, 4, 8),
    "hosts": one_of(1, 2, 4, 8),
    "leader_address": Rule("HOST:PORT, or [IPV6]:PORT", lambda value: split_address(value) is not None),
    "secret_file": PATH,
    "join_timeout_s": Rule("a finite number >= 1", lambda value: 1 <= value < math.inf),
    "dense_batch_tokens": TOKENS,
    "chunk_tokens": TOKENS,
    "prompt_tokens": TOKENS,
    "inter_token_target_ms": Rule("a finite number > 0 or null", lambda value: 0 < value < math.inf),
    "max_running": TOKENS,
    "max_queue_size": whole(1),
    "queue_timeout_us": whole(1, 2**53, or_null=True),
    "max_answer_bytes": whole(1, 2**53),
    "priority_aging_s": Rule("a finite number >= 0", lambda value: 0 <= value < math.inf),
    "max_engine_restarts": whole(0),
    "engine_stall_s": Rule("a finite number >= 2 or null", lambda value: 2 <= value < math.inf),
    "max_model_tokens": whole(2, or_null=True),  # one of a prompt, one of an answer
    "page_tokens": TOKENS,
    "kv_cache_tokens": TOKENS,
    "host_kv_cache_bytes": BYTES,
    "host_kv_cache_step_bytes": whole(1, 2**53, or_null=True),
    "gpu_memory_utilization": Rule("a number in (0, 1]", lambda value: 0 < value <= 1),
    "metrics_dialects": Rule("different ones", lambda value: len(set(value)) == len(value)),
    "otlp_traces_endpoint": Rule("an http(s) URL or null", lambda value: value.startswith(("http://", "https://"))),
    "seed": whole(-(2**63), 2**63),
}


class DiskKvCache(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where pages of the KV cache are kept as files, which several engines of a host may share."""

    path: str  # a folder, made where there is none
    bytes: int  # most that its files take


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """engine.json, field for field. Paths are absolute here; in the file they may be relative to it."""

    model: str  # Hugging Face folder
    schedule: str = "sequential"  # a preset ("sequential", "nano-batched-3"), a schedule file, or "auto": find one
    schedule_workload: str = "1024/512"  # mean prompt/output tokens of a request, that "auto" finds a schedule for
    schedule_cache: str | None = None  # folder of what "auto" has found; None: nanoflow/schedules in the user's cache
    python: str | None = None  # the engine process's interpreter; None: the one that runs the server's stub
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"  # of weights and activations; auto: by device
    quantization: Literal["fp8"] | None = None  # fp8: 16-bit weights become e4m3 as they are loaded
    # Of KV pages; auto: fp8_e4m3 where the checkpoint has scales for it, else as dtype.
    kv_cache_dtype: Literal["auto", "float32", "float16", "bfloat16", "fp8_e4m3"] = "auto"
    load_format: Literal["safetensors", "dummy"] = "safetensors"  # dummy: random weights, of config.json's shape
    tensor_parallel: int = 1  # ranks
    hosts: int = 1  # that share the ranks, as many each; this one is the leader, the others run `nanoflow rank`
    leader_address: str | None = None  # HOST:PORT of this host, where the others join; None: by the environment
    secret_file: str | None = None  # of what the hosts prove to each other to have
    join_timeout_s: float = 600.0  # the longest wait for the other hosts
    # How ranks exchange rows; auto: gloo on the CPU, peer where every GPU can map every other's memory, else nccl.
    collectives: Literal["auto", "gloo", "nccl", "peer"] = "auto"
    gpus: tuple[int, ...] | None = None  # one for each rank of a host, as the server's process counts; None: the first
    dense_batch_tokens: int | None = None  # B_dense: tokens of one step; None: by schedule file, or by device
    chunk_tokens: int | None = None  # most tokens of one request in one step; None: dense_batch_tokens
    prompt_tokens: int | None = None  # most of all prompts in one step, if B_dense has room; None: dense_batch_tokens
    inter_token_target_ms: float | None = None  # for a step with decodes: prompts are cut so that it takes no longer
    max_running: int | None = None  # requests that hold pages; None: dense_batch_tokens
    max_queue_size: int = 4096  # requests that wait beyond those; more are refused
    queue_timeout_us: int | None = None  # a request that has not begun by then is refused; its own may be shorter
    max_answer_bytes: int = 2**29  # a request whose answer could take more is refused
    priority_aging_s: float = 60.0  # a request overtakes those of the next priority that came so much before it
    max_engine_restarts: int = 5  # in a row, when its process dies; then the model must be reloaded
    engine_stall_s: float | None = 300.0  # the longest that a step may take; then its process is restarted. None: never
    max_model_tokens: int | None = None  # prompt + output; None: the model's max_position_embeddings
    page_tokens: int | None = None  # KV page size; None: by device
    kv_cache_tokens: int | None = None  # size of the KV cache on each rank's share of heads; None: by device
    host_kv_cache_bytes: int = 0  # host memory, of all ranks together, for pages that leave the device; 0: none
    host_kv_cache_keep: Literal["all", "seen_twice"] = (
        "all"  # pages that go there; the second: what was asked for again
    )
    host_kv_cache_step_bytes: int | None = None  # most copied there beside a step; None: twice what a step can fill
    disk_kv_cache: DiskKvCache | None = None  # keeps pages of host memory beyond the life of the engine
    gpu_memory_utilization: float = 0.92  # of the GPU's memory, for weights, workspace and the KV cache
    prefix_caching: bool = True
    async_scheduling: bool = True  # launch step i+1 before the results of step i are read
    cuda_graphs: bool = True  # False: a kernel at a time, to debug or to compare
    # Names that the metrics page has: ours, those of vLLM, those of Triton's TensorRT-LLM backend.
    metrics_dialects: tuple[Literal["nanoflow", "vllm", "trtllm"], ...] = ("nanoflow", "vllm")
    otlp_traces_endpoint: str | None = None  # of a collector, OTLP over HTTP: "http://collector:4318/v1/traces"
    kv_events: KvEventsConfig | None = None  # tell gateways which KV pages there are; None: do not
    seed: int = 0  # draws the seeds of requests that come without one

    def __post_init__(self) -> None:
        faults = broken(RULES, {name: getattr(self, name) for name in self.__struct_fields__})
        gpus, ranks = self.gpus, self.tensor_parallel // max(self.hosts, 1)
        if self.tensor_parallel % max(self.hosts, 1):
            faults.append(f"hosts: expected a divisor of tensor_parallel ({self.tensor_parallel}), got {self.hosts}")
        if self.hosts > 1 and self.secret_file is None:
            faults.append(f"secret_file: expected a file with the secret that {self.hosts} hosts share, got null")
        if gpus is not None and ((len(gpus), len(set(gpus))) != (ranks, ranks) or min(gpus) < 0):
            why = "tensor_parallel" if self.hosts == 1 else "tensor_parallel / hosts"
            faults.append(f"gpus: expected {ranks} different ids ({why}), got {list(gpus)}")
        if self.hosts > 1 and self.collectives == "peer":
            faults.append(f"collectives: expected auto, gloo or nccl on {self.hosts} hosts, got peer")
        if gpus is not None and self.device == "cpu":
            faults.append(f"gpus: expected none with device cpu, got {list(gpus)}")
        if (self.max_running or 0) > (self.dense_batch_tokens or math.inf):
            faults.append(
                f"max_running: expected at most dense_batch_tokens ({self.dense_batch_tokens}), "
                f"since every running request decodes in every step; got {self.max_running}"
            )
        if self.kv_events is not None and self.kv_events.publisher != "null" and not self.prefix_caching:
            faults.append("kv_events: expected null without prefix_caching, since no page can be found then")
        faults += self._tier_faults()
        if faults:
            raise ConfigError("; ".join(faults))

    def _tier_faults(self) -> list[str]:
        """What is wrong with the tiers of the KV cache below the device."""
        faults, host, disk = [], self.host_kv_cache_bytes, self.disk_kv_cache
        if host and not self.prefix_caching:
            faults.append(f"host_kv_cache_bytes: expected 0 without prefix_caching, which finds its pages, got {host}")
        if disk and not host:
            faults.append("disk_kv_cache: expected host_kv_cache_bytes above 0, for its pages go through host memory")
        if disk:
            rules = {"disk_kv_cache.path": PATH, "disk_kv_cache.bytes": whole(1, 2**63)}
            faults += broken(rules, {"disk_kv_cache.path": disk.path, "disk_kv_cache.bytes": disk.bytes})
        return faults

    def settle(self, device: Literal["cpu", "cuda"]) -> SettledConfig:
        """The same on a device: what was left to it has a value.

        Raises:
            ConfigError: what this device cannot do.
        """
        if (self.collectives == "gloo") == (device == "cuda") and self.collectives != "auto":
            possible = "auto or gloo" if device == "cpu" else "auto, nccl or peer"
            raise ConfigError(f"collectives: expected {possible} on {device}, got {self.collectives}")
        fields = {name: getattr(self, name) for name in self.__struct_fields__}
        precision = self.precision_on(device)
        kv_cache_dtype = "fp8_e4m3" if precision.kv == FP8 else precision.kv
        fields |= {"device": device, "dtype": precision.weights, "kv_cache_dtype": kv_cache_dtype}
        defaults = DEFAULTS[device]._asdict()
        if device == "cpu":
            fields["collectives"] = "gloo"
        dense_batch_tokens = self.dense_batch_tokens or defaults["dense_batch_tokens"]
        defaults |= dict.fromkeys(("chunk_tokens", "prompt_tokens", "max_running"), dense_batch_tokens)
        unset = {name: value for name, value in defaults.items() if fields[name] is None}
        return SettledConfig(**fields | unset)

    def precision_on(self, device: Literal["cpu", "cuda"]) -> Precision:
        """What weights, activations and KV pages are kept in.

        Raises:
            ConfigError: KV pages of another dtype than the kernels of this device read.
        """
        dtype = DEFAULTS[device].dtype if self.dtype == "auto" else self.dtype
        if self.kv_cache_dtype == "fp8_e4m3":
            return Precision(weights=dtype, activations=dtype, kv=FP8)
        kv = dtype if self.kv_cache_dtype == "auto" else self.kv_cache_dtype
        if device == "cuda" and kv != dtype:
            raise ConfigError(f"kv_cache_dtype: expected {dtype}, as dtype is, or fp8_e4m3 on cuda, got {kv}")
        return Precision(weights=dtype, activations=dtype, kv=kv)

    @classmethod
    def load(cls, path: Path, parameters: Mapping[str, Any] | None = None) -> EngineConfig:
        """Read an engine.json; `parameters` (numbers may be strings, as in config.pbtxt) win over it.

        Raises:
            ConfigError: naming the file, the key and what was expected.
        """
        return cls.resolve({**read_json(path), **(parameters or {})}, relative_to=path.parent, origin=str(path))

    @classmethod
    def resolve(cls, fields: Mapping[str, Any], relative_to: Path, origin: str = "engine config") -> EngineConfig:
        """Check `fields` and make their paths absolute."""

        def rooted(key: str, value: Any) -> Any:
            if key == "disk_kv_cache" and isinstance(value, Mapping) and isinstance(value.get("path"), str):
                return {**value, "path": os.path.normpath(relative_to / os.path.expanduser(value["path"]))}
            is_path = (
                key in ("model", "schedule_cache", "secret_file")
                or (key == "python" and "/" in str(value))
                or str(value).endswith(".json")
            )
            if not is_path or not isinstance(value, str):
                return value
            # Not resolve(): the python of a virtual environment is a link that must stay one.
            return os.path.normpath(relative_to / os.path.expanduser(value))

        absolute = {key: rooted(key, value) for key, value in fields.items()}
        if isinstance(text := absolute.get("kv_events"), str):  # as a parameter of config.pbtxt
            absolute["kv_events"] = parse_json(text, f"{origin}: kv_events")
        if isinstance(dialects := absolute.get("metrics_dialects"), str):  # as config.pbtxt has to say it
            absolute["metrics_dialects"] = [name.strip() for name in dialects.split(",") if name.strip()]
        return convert(absolute, cls, origin, strict=False, rules=RULES)


class SettledConfig(EngineConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An EngineConfig on its device. Only the size of the KV cache may be open, for a GPU's is measured; and until
    `settle` has looked at the GPUs, the collectives."""

    device: Literal["cpu", "cuda"]
    dtype: Dtype
    kv_cache_dtype: Literal["float32", "float16", "bfloat16", "fp8_e4m3"]
    dense_batch_tokens: int
    chunk_tokens: int
    prompt_tokens: int
    max_running: int
    page_tokens: int

    @property
    def precision(self) -> Precision:
        """What weights, activations and KV pages are kept in."""
        return self.precision_on(self.device)


class DeviceDefaults(NamedTuple):
    """What None or "auto" means on a device."""

    dtype: Dtype
    dense_batch_tokens: int
    page_tokens: int
    kv_cache_tokens: int | None  # None: what weights and workspace leave of the device's memory


DEFAULTS = {
    "cpu": DeviceDefaults("float32", 512, 16, 65536),
    # On all SMs of an H200 decode attention reads pages of 64 tokens as fast as 128; a request's last page wastes half.
    # 2048 tokens a step: Llama-3-8B runs Splitwise's lengths at 32.8k tokens/s, with 4096 at 31.5k; 512/1024 at 22.2k,
    # with 1280, which its mix would fill, at 20.5k (benchmarks/results/offline_*, ablation_*).
    "cuda": DeviceDefaults("bfloat16", 2048, 64, None),
}
