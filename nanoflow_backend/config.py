"""ModelConfig and EngineConfig: read once at the edge, strict, frozen, never mutated."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import msgspec

from nanoflow_backend.model_folder import is_lfs_pointer, lfs_hint, what_is_wrong

MOST_FILE_BYTES = 256 * 2**20  # of JSON; the largest tokenizer.json of today has some 35 MB
MOST_REPEATS = 4096  # of what is a loop here: layers, experts

T = TypeVar("T")
Dtype = Literal["float32", "float16", "bfloat16"]
ROPE_KEYS = {  # that a scaling cannot do without
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
ROPE_SETTINGS = ("rope_theta", "rope_type", "type", "partial_rotary_factor")  # that every scaling may have
ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "MixtralForCausalLM": "mixtral"}
# What a key means that config.json leaves out: the default of the architecture's config class in transformers (4.57 and
# 5.23 agree). Sizes of matrices are not here, since nobody leaves them to a default. None: heads share nothing, hidden
# size over heads, no window, no end.
CLASS_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        "hidden_act": "silu", "num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False, "eos_token_id": 2,
    },
    "qwen2": {
        "hidden_act": "silu", "num_key_value_heads": 32, "head_dim": None, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False, "eos_token_id": None,
        "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
    },
    "mixtral": {
        "hidden_act": "silu", "num_key_value_heads": 8, "head_dim": None, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "tie_word_embeddings": False, "eos_token_id": 2,
        "num_local_experts": 8, "num_experts_per_tok": 2,
    },
}  # fmt: skip


class ConfigError(ValueError):
    """A configuration cannot be used: the message names the file, the key and what was expected."""


class RopeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary embedding. `llama3` scaling stretches low frequencies by `factor` (Llama-3.1), `linear` all of them."""

    theta: float = 10000.0
    scaling: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self) -> None:
        for name in ("theta", "factor"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}: expected a finite number > 0, got {getattr(self, name)}")
        if self.scaling == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor < math.inf:
            raise ConfigError(
                f"expected 0 < low_freq_factor < high_freq_factor, got {self.low_freq_factor}, {self.high_freq_factor}"
            )
        if self.original_max_positions < 1:
            raise ConfigError(
                f"original_max_position_embeddings: expected an integer >= 1, got {self.original_max_positions}"
            )


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of a model, from the config.json and generation_config.json of a Hugging Face folder."""

    architecture: Literal["llama", "qwen2", "mixtral"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_model_tokens: int
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    dtype: Dtype = "bfloat16"  # of the checkpoint's tensors
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_pretrained(cls, folder: Path) -> ModelConfig:
        """Read a Hugging Face folder; keys may be spelled as before or since transformers 5.

        Raises:
            ConfigError: a missing file or key, or a feature this engine does not compute.
        """
        if wrong := what_is_wrong(folder):
            raise ConfigError(wrong)
        return cls.from_hf(
            _read_json(folder / "config.json"),
            _read_json(folder / "generation_config.json") if (folder / "generation_config.json").exists() else {},
            origin=str(folder / "config.json"),
        )

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], generation: Mapping[str, Any], origin: str = "config.json") -> ModelConfig:
        """Read what the two files hold. A key that is absent means what transformers' class means by that."""
        names = hf.get("architectures")
        if names is None:
            raise ConfigError(f"{origin}: key 'architectures' is missing")
        if not isinstance(names, list) or not names or names[0] not in list(ARCHITECTURES):
            raise ConfigError(f"{origin}: architectures: expected one of {', '.join(ARCHITECTURES)}, got {names!r}")
        architecture = ARCHITECTURES[names[0]]
        given, hf = hf, {**CLASS_DEFAULTS[architecture], **hf}

        def size(key: str, default: int | None = None, most: int = 2**31 - 1) -> int:
            if (value := hf.get(key)) is None:
                value = default
            if value is None:
                raise ConfigError(f"{origin}: key {key!r} is missing")
            if type(value) is not int or not 1 <= value <= most:
                raise ConfigError(f"{origin}: {key}: expected an integer in 1..{most}, got {value!r}")
            return value

        def refuse(used: object, what: str) -> None:
            if used:
                raise ConfigError(f"{origin}: {what} is not supported")

        refuse(hf["hidden_act"] != "silu", f"hidden_act {hf['hidden_act']!r} (only silu)")
        refuse(hf.get("attention_bias"), "attention_bias")
        refuse(hf.get("mlp_bias"), "mlp_bias")
        refuse(quantization := hf.get("quantization_config"), f"quantization_config{_method(quantization)}")
        hidden, heads = size("hidden_size"), size("num_attention_heads")
        layers = size("num_hidden_layers", most=MOST_REPEATS)
        _refuse_windows(hf, architecture, layers, origin)
        refuse(hf["head_dim"] is None and hidden % heads, f"hidden_size {hidden} without head_dim, over {heads} heads")
        head_dim = size("head_dim", hidden // heads)
        refuse(head_dim % 2, f"an odd head_dim, {head_dim},")
        eos = generation.get("eos_token_id", hf["eos_token_id"])
        moe = architecture == "mixtral"
        if moe and (experts := _agreed(given, ("num_local_experts", "num_experts"), origin)) is not None:
            hf["num_local_experts"] = experts  # transformers reads both names
        fields = {
            "architecture": architecture,
            "vocab_size": size("vocab_size"),
            "hidden_size": hidden,
            "intermediate_size": size("intermediate_size"),
            "num_layers": layers,
            "num_heads": heads,
            "num_kv_heads": size("num_key_value_heads", heads),
            "head_dim": head_dim,
            "rms_norm_eps": hf["rms_norm_eps"],
            "rope": _rope(given, CLASS_DEFAULTS[architecture]["rope_theta"], origin),
            "max_model_tokens": size("max_position_embeddings"),
            "tie_word_embeddings": hf["tie_word_embeddings"],
            "qkv_bias": architecture == "qwen2",
            "num_experts": size("num_local_experts", most=MOST_REPEATS) if moe else 0,
            "experts_per_token": size("num_experts_per_tok") if moe else 0,
            "dtype": _agreed(hf, ("dtype", "torch_dtype"), origin) or "float32",  # what transformers assumes
            "eos_token_ids": eos if isinstance(eos, list) else [] if eos is None else [eos],
        }
        config = _convert(fields, cls, origin)
        if config.num_heads % config.num_kv_heads:
            raise ConfigError(
                f"{origin}: num_attention_heads {config.num_heads} is not a multiple of "
                f"num_key_value_heads {config.num_kv_heads}"
            )
        if config.experts_per_token > config.num_experts:
            raise ConfigError(
                f"{origin}: num_experts_per_tok {config.experts_per_token} is more than "
                f"num_local_experts {config.num_experts}"
            )
        return config


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """engine.json, field for field. Paths are absolute here; in the file they may be relative to it."""

    model: str  # Hugging Face folder
    schedule: str = "sequential"  # a preset ("sequential", "nano-batched-3"), a schedule file, or "auto": find one
    schedule_workload: str = "1024/512"  # mean prompt/output tokens of a request, that "auto" finds a schedule for
    schedule_cache: str | None = None  # folder of what "auto" has found; None: nanoflow/schedules in the user's cache
    python: str | None = None  # the engine process's interpreter; None: the one that runs the server's stub
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"  # of weights, activations and KV pages
    load_format: Literal["safetensors", "dummy"] = "safetensors"  # dummy: random weights, of config.json's shape
    tensor_parallel: int = 1  # ranks
    gpus: tuple[int, ...] | None = None  # one for each rank, as the server's process counts them; None: the first ones
    dense_batch_tokens: int | None = None  # B_dense: tokens of one step; None: by schedule file, or by device
    chunk_tokens: int | None = None  # most tokens of one request in one step; None: dense_batch_tokens
    prompt_tokens: int | None = None  # most of all prompts in one step, if B_dense has room; None: dense_batch_tokens
    max_running: int | None = None  # requests that hold pages; None: dense_batch_tokens
    max_queue_size: int = 4096  # requests that wait beyond those; more are refused
    queue_timeout_us: int | None = None  # a request that has not begun by then is refused; its own may be shorter
    priority_aging_s: float = 60.0  # a request overtakes those of the next priority that came so much before it
    max_engine_restarts: int = 5  # in a row, when its process dies; then the model must be reloaded
    max_model_tokens: int | None = None  # prompt + output; None: the model's max_position_embeddings
    page_tokens: int | None = None  # KV page size; None: by device
    kv_cache_tokens: int | None = None  # size of the KV cache on each rank's share of heads; None: by device
    gpu_memory_utilization: float = 0.92  # of the GPU's memory, for weights, workspace and the KV cache
    prefix_caching: bool = True
    async_scheduling: bool = True  # launch step i+1 before the results of step i are read
    cuda_graphs: bool = True  # False: a kernel at a time, to debug or to compare
    otlp_traces_endpoint: str | None = None  # of a collector, OTLP over HTTP: "http://collector:4318/v1/traces"
    seed: int = 0  # draws the seeds of requests that come without one

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[1-9]\d*/[1-9]\d*", self.schedule_workload, re.ASCII):
            raise ConfigError(
                f"schedule_workload: expected PROMPT/OUTPUT tokens such as 1024/512, got {self.schedule_workload!r}"
            )
        if self.max_queue_size < 1:
            raise ConfigError(f"max_queue_size: expected an integer >= 1, got {self.max_queue_size}")
        if not 0 <= self.priority_aging_s < math.inf:
            raise ConfigError(f"priority_aging_s: expected a finite number >= 0, got {self.priority_aging_s}")
        if self.max_engine_restarts < 0:
            raise ConfigError(f"max_engine_restarts: expected an integer >= 0, got {self.max_engine_restarts}")
        for field in (
            "dense_batch_tokens", "chunk_tokens", "prompt_tokens", "max_running", "max_model_tokens", "page_tokens",
            "kv_cache_tokens", "queue_timeout_us",
        ):  # fmt: skip
            if getattr(self, field) is not None and getattr(self, field) < 1:
                raise ConfigError(f"{field}: expected an integer >= 1 or null, got {getattr(self, field)}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"gpu_memory_utilization: expected a number in (0, 1], got {self.gpu_memory_utilization}")
        collector = self.otlp_traces_endpoint
        if collector is not None and not collector.startswith(("http://", "https://")):
            raise ConfigError(f"otlp_traces_endpoint: expected an http(s) URL or null, got {collector!r}")
        if self.tensor_parallel not in (1, 2, 4, 8):
            raise ConfigError(f"tensor_parallel: expected 1, 2, 4 or 8, got {self.tensor_parallel}")
        gpus, ranks = self.gpus, self.tensor_parallel
        if gpus is not None and ((len(gpus), len(set(gpus))) != (ranks, ranks) or min(gpus) < 0):
            raise ConfigError(f"gpus: expected {ranks} different ids (tensor_parallel), got {list(gpus)}")
        if gpus is not None and self.device == "cpu":
            raise ConfigError(f"gpus: expected none with device cpu, got {list(gpus)}")
        if (self.max_running or 0) > (self.dense_batch_tokens or math.inf):
            raise ConfigError(
                f"max_running: expected at most dense_batch_tokens ({self.dense_batch_tokens}), "
                f"since every running request decodes in every step; got {self.max_running}"
            )

    def settle(self, device: Literal["cpu", "cuda"]) -> SettledConfig:
        """The same on a device: what was left to it has a value.

        Raises:
            ConfigError: what this device cannot do.
        """
        if device == "cuda" and self.tensor_parallel > 1:
            raise ConfigError(f"tensor_parallel: expected 1 on cuda, got {self.tensor_parallel}")
        fields = {name: getattr(self, name) for name in self.__struct_fields__}
        fields |= {"device": device, "dtype": None if self.dtype == "auto" else self.dtype}
        defaults = DEFAULTS[device]._asdict()
        dense_batch_tokens = self.dense_batch_tokens or defaults["dense_batch_tokens"]
        defaults |= dict.fromkeys(("chunk_tokens", "prompt_tokens", "max_running"), dense_batch_tokens)
        unset = {name: value for name, value in defaults.items() if fields[name] is None}
        return SettledConfig(**fields | unset)

    @classmethod
    def load(cls, path: Path, parameters: Mapping[str, Any] | None = None) -> EngineConfig:
        """Read an engine.json; `parameters` (numbers may be strings, as in config.pbtxt) win over it.

        Raises:
            ConfigError: naming the file, the key and what was expected.
        """
        return cls.resolve({**_read_json(path), **(parameters or {})}, relative_to=path.parent, origin=str(path))

    @classmethod
    def resolve(cls, fields: Mapping[str, Any], relative_to: Path, origin: str = "engine config") -> EngineConfig:
        """Check `fields` and make their paths absolute."""

        def rooted(key: str, value: Any) -> Any:
            is_path = (
                key in ("model", "schedule_cache")
                or (key == "python" and "/" in str(value))
                or str(value).endswith(".json")
            )
            if not is_path or not isinstance(value, str):
                return value
            # Not resolve(): the python of a virtual environment is a link that must stay one.
            return os.path.normpath(relative_to / Path(value).expanduser())

        absolute = {key: rooted(key, value) for key, value in fields.items()}
        return _convert(absolute, cls, origin, strict=False)


class SettledConfig(EngineConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An EngineConfig on its device. Only the size of the KV cache may be open: a GPU's is measured."""

    device: Literal["cpu", "cuda"]
    dtype: Dtype
    dense_batch_tokens: int
    chunk_tokens: int
    prompt_tokens: int
    max_running: int
    page_tokens: int


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


def _method(quantization: Any) -> str:
    """The name of a quantization method, for a message."""
    name = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    return "" if name is None else f" ({name})"


def _agreed(hf: Mapping[str, Any], names: tuple[str, ...], origin: str) -> Any:
    """The value of a setting that has several names; None where all are absent or null.

    Raises:
        ConfigError: two of them differ.
    """
    given = {name: hf[name] for name in names if hf.get(name) is not None}
    for name, value in given.items():
        first = next(iter(given))
        if value != given[first]:
            raise ConfigError(f"{origin}: {first} {given[first]!r} and {name} {value!r} say two things: keep one")
    return next(iter(given.values()), None)


def _refuse_windows(hf: Mapping[str, Any], architecture: str, layers: int, origin: str) -> None:
    """Refuse a model of which any layer sees a window of the context alone."""
    window, kinds = hf.get("sliding_window"), hf.get("layer_types")
    if architecture == "qwen2":  # the first max_window_layers layers have none, unless layer_types says otherwise
        used = hf["use_sliding_window"] and window is not None and kinds is None
        if type(first := hf["max_window_layers"]) is not int:
            raise ConfigError(f"{origin}: max_window_layers: expected an integer, got {first!r}")
        used = used and first < layers
    else:
        used = window is not None
    if used:
        raise ConfigError(f"{origin}: sliding_window {window!r} is not supported")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise ConfigError(f"{origin}: layer_types: expected full_attention for every layer, got {kinds!r}")


def _rope(hf: Mapping[str, Any], default_theta: float, origin: str) -> RopeConfig:
    """`rope_parameters` since transformers 5; before, `rope_theta` beside `rope_scaling` (whose `type` was renamed).

    Raises:
        ConfigError: they say different things, or what this engine does not compute.
    """
    objects: dict[str, Mapping[str, Any]] = {}
    for name in ("rope_parameters", "rope_scaling"):
        value = hf.get(name)
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"{origin}: {name}: expected an object or null, got {value!r}")
        if value and (kinds := [key for key, inner in value.items() if isinstance(inner, dict)]):
            raise ConfigError(
                f"{origin}: {name} with an object for each kind of layer ({', '.join(kinds)}) is not supported; "
                "expected one for all layers"
            )
        if value:
            objects[name] = value
    everywhere = {**hf, **{f"{name}.{key}": value for name in objects for key, value in objects[name].items()}}

    def setting(key: str) -> Any:
        return _agreed(everywhere, (*(f"{name}.{key}" for name in objects), key), origin)

    rotated = setting("partial_rotary_factor")
    if rotated not in (None, 1):
        raise ConfigError(f"{origin}: partial_rotary_factor {rotated} is not supported")
    theta = setting("rope_theta")
    theta = default_theta if theta is None else theta
    readings = {name: _read_rope(scaling, theta, name, origin) for name, scaling in objects.items()}
    if len(set(readings.values())) > 1:
        raise ConfigError(
            f"{origin}: rope_parameters {hf['rope_parameters']} and rope_scaling {hf['rope_scaling']} say two things: "
            "keep one (the scaling belongs into rope_parameters since transformers 5)"
        )
    return next(iter(readings.values()), None) or _convert({"theta": theta}, RopeConfig, f"{origin}: rope")


def _read_rope(scaling: Mapping[str, Any], theta: Any, name: str, origin: str) -> RopeConfig:
    kind = _agreed(scaling, ("rope_type", "type"), f"{origin}: {name}") or "default"
    if kind not in list(ROPE_KEYS):
        raise ConfigError(f"{origin}: rope scaling {kind!r} is not supported (default, linear and llama3 are)")
    for key in ROPE_KEYS[kind]:
        if scaling.get(key) is None:
            raise ConfigError(f"{origin}: rope scaling {kind!r}: key {key!r} is missing")
    for key, value in scaling.items():
        if value is not None and key not in (*ROPE_KEYS[kind], *ROPE_SETTINGS):
            raise ConfigError(
                f"{origin}: {name}: rope scaling {kind!r} has no key {key!r}; expected "
                f"{', '.join((*ROPE_SETTINGS, *ROPE_KEYS[kind]))}"
            )
    renamed = {"original_max_position_embeddings": "original_max_positions"}
    fields = {renamed.get(key, key): scaling[key] for key in ROPE_KEYS[kind]}
    return _convert({"theta": theta, "scaling": kind, **fields}, RopeConfig, f"{origin}: rope")


def read_file(path: Path) -> bytes:
    """A whole file of a model's folder. It may be a link, as in a cache of downloads.

    Raises:
        ConfigError: it cannot be read, is no file (a pipe would keep us waiting), or larger than any such file is.
    """
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path}: expected a file, got something else")
        if (size := path.stat().st_size) > MOST_FILE_BYTES:
            raise ConfigError(f"{path}: expected at most {MOST_FILE_BYTES} bytes, got {size}")
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    if is_lfs_pointer(content):
        raise ConfigError(lfs_hint(path))
    return content


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(read_file(path), type=dict[str, Any])
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None


def _convert(fields: Mapping[str, Any], kind: type[T], origin: str, strict: bool = True) -> T:
    try:
        return msgspec.convert(fields, kind, strict=strict)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{origin}: {error.__cause__ or error}") from None
