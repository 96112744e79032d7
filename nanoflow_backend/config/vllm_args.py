"""vLLM's engine arguments, as a model.json of Triton's vLLM backend has them, become fields of engine.json.

Each argument up to vLLM 0.26, and those that older ones had, is in one of the tables:

* `TRANSLATED`: there is an equivalent.
* `DECISIVE`: what the model says, or which devices and code it uses, depends on it. Listed are the values that mean
  what this engine does anyway; any other is refused.
* `IDLE`: only speed, logs or parts that this engine does not have depend on it. It is named in a warning.
* `LOCATING`: where the model's files are.

An argument in none of them is refused as unknown. null is the default of every argument.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nanoflow_backend.config.error import ConfigError

log = logging.getLogger(__name__)

PAGE = "docs/from-vllm-backend.md"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
DTYPES = {"half": "float16", "float": "float32"}  # vLLM's other spellings
KV_DTYPES = {**DTYPES, "fp8": "fp8_e4m3"}
FP8_METHODS = ("compressed-tensors", "fbgemm_fp8", "modelopt")  # of checkpoints; "fp8" is both
FORMATS = {"auto": "safetensors", "hf": "safetensors", "fastsafetensors": "safetensors"}
BLOCK_TOKENS = 16  # vLLM's default block_size


def engine_fields(args: Mapping[str, Any], folder: Path, origin: str) -> dict[str, Any]:
    """The fields of engine.json that say the same; a warning names what has no effect.

    Args:
        args: as in the file.
        folder: that of the file, where a relative path of a model begins.
        origin: the file, for messages.

    Raises:
        ConfigError: all arguments that are refused, with what was expected.
    """
    given = {name: _plain(value) for name, value in args.items() if value is not None}
    if refused := list(_refusals(given)):
        raise ConfigError(f"{origin}: {'; '.join(refused)} ({PAGE} says why)")
    if idle := list(_without_effect(given)):
        log.warning("%s: without effect here: %s", origin, "; ".join(idle))
    fields = {field: value(given) for name, (field, value) in TRANSLATED.items() if name in given}
    if "model" in fields:
        fields["model"] = _downloaded(given, folder) or fields["model"]
    return {field: value for field, value in fields.items() if value is not None}


def spoken(error: str) -> str:
    """An error about fields of engine.json, which adds what those are called in model.json."""
    pairs = [
        f"{field} is {name} there"
        for name, (field, _) in TRANSLATED.items()
        if name != field and re.search(rf"\b{field}\b", error)
    ]
    return f"{error} ({', '.join(pairs)})" if pairs else error


def _plain(value: Any) -> Any:
    """Switches may be texts, as the vLLM backend takes them."""
    return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value


def _refusals(given: Mapping[str, Any]) -> Iterator[str]:
    for name, value in given.items():
        if name in DECISIVE and not any(value == neutral for neutral in DECISIVE[name]):
            expected = " or ".join(["null", *(repr(neutral) for neutral in DECISIVE[name])])
            yield f"{name}: not implemented; expected {expected}, got {value!r}"
        elif name not in KNOWN:
            yield f"{name}: unknown argument of vLLM's engine"
    tokenizer = given.get("tokenizer")
    if tokenizer is not None and tokenizer != given.get("model"):
        yield f"tokenizer: not implemented; expected null or the model, got {tokenizer!r}"


def _without_effect(given: Mapping[str, Any]) -> Iterator[str]:
    for why, names in IDLE.items():
        if idle := [name for name in names.split() if name in given]:
            yield f"{', '.join(idle)} ({why})"


def _downloaded(given: Mapping[str, Any], folder: Path) -> str | None:
    """The folder of a model that is named as on the Hugging Face hub, where vLLM has downloaded it to.

    None where `model` is a path, or is not among the downloads: nothing is downloaded here.
    """
    model = str(given["model"])
    if not HUB_ID.fullmatch(model) or (folder / model).exists():
        return None
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(given.get("download_dir") or os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    downloads = cache / f"models--{model.replace('/', '--')}"
    revision = str(given.get("revision") or "main")
    reference = downloads / "refs" / revision  # a branch; a commit has no file here
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshot = downloads / "snapshots" / commit
    return str(snapshot) if snapshot.is_dir() else None


def _value(name: str, spellings: Mapping[Any, Any] | None = None) -> Callable[[Mapping[str, Any]], Any]:
    """The argument as it is, or by another spelling. What is no value of the field is refused where the field is."""

    def value(given: Mapping[str, Any]) -> Any:
        found = given[name]
        return spellings.get(found, found) if spellings and isinstance(found, str | int) else found

    return value


def _gibibytes(name: str) -> Callable[[Mapping[str, Any]], Any]:
    """The argument in bytes."""

    def value(given: Mapping[str, Any]) -> Any:
        try:
            return round(float(given[name]) * 2**30)
        except (TypeError, ValueError, OverflowError):
            return given[name]

    return value


def _blocks(given: Mapping[str, Any]) -> Any:
    blocks, block_tokens = given["num_gpu_blocks_override"], given.get("block_size", BLOCK_TOKENS)
    return blocks * block_tokens if isinstance(blocks, int) and isinstance(block_tokens, int) else blocks


def _quantization(given: Mapping[str, Any]) -> Any:
    """The methods that checkpoints name are found in config.json; only quantising at load must be asked for."""
    return None if given["quantization"] in FP8_METHODS else given["quantization"]


def _cuda_graphs(given: Mapping[str, Any]) -> Any:
    eager = given["enforce_eager"]
    return not eager if isinstance(eager, bool) else eager


def _kv_events(given: Mapping[str, Any]) -> Any:
    """The keys are the same but for vLLM's switch, without which it publishes nothing."""
    events = given["kv_events_config"]
    switch = _plain(events.get("enable_kv_cache_events", False)) if isinstance(events, Mapping) else None
    if not isinstance(switch, bool):
        return events
    kept = {key: value for key, value in events.items() if key != "enable_kv_cache_events" and value is not None}
    return kept if switch else None


# Argument: the field, and its value of all the arguments. None leaves the field at its default.
TRANSLATED: dict[str, tuple[str, Callable[[Mapping[str, Any]], Any]]] = {
    "model": ("model", _value("model")),
    "device": ("device", _value("device")),
    "device_ids": ("gpus", _value("device_ids")),
    "dtype": ("dtype", _value("dtype", DTYPES)),
    "quantization": ("quantization", _quantization),
    "kv_cache_dtype": ("kv_cache_dtype", _value("kv_cache_dtype", KV_DTYPES)),
    "load_format": ("load_format", _value("load_format", FORMATS)),
    "tensor_parallel_size": ("tensor_parallel", _value("tensor_parallel_size")),
    "max_model_len": ("max_model_tokens", _value("max_model_len", {-1: None, "auto": None})),
    "max_num_batched_tokens": ("dense_batch_tokens", _value("max_num_batched_tokens")),
    "max_num_seqs": ("max_running", _value("max_num_seqs")),
    "long_prefill_token_threshold": ("chunk_tokens", _value("long_prefill_token_threshold", {0: None})),
    "num_gpu_blocks_override": ("kv_cache_tokens", _blocks),
    "gpu_memory_utilization": ("gpu_memory_utilization", _value("gpu_memory_utilization")),
    "kv_offloading_size": ("host_kv_cache_bytes", _gibibytes("kv_offloading_size")),
    "enable_prefix_caching": ("prefix_caching", _value("enable_prefix_caching")),
    "async_scheduling": ("async_scheduling", _value("async_scheduling")),
    "enforce_eager": ("cuda_graphs", _cuda_graphs),
    "kv_events_config": ("kv_events", _kv_events),
    "seed": ("seed", _value("seed")),
}

DECISIVE: dict[str, tuple[Any, ...]] = {
    # other weights, or other arithmetic
    "quantization_config": ({},),
    "model_weights": ("",),
    "hf_config_path": (),
    "hf_overrides": ({},),
    "rope_scaling": ({},),
    "rope_theta": (),
    "config_format": ("auto", "hf"),
    "override_attention_dtype": (),
    "disable_sliding_window": (False,),
    "model_class_overrides": ({},),
    "model_impl": ("auto", "vllm"),
    # other tokens, or another end
    "tokenizer_mode": ("auto", "hf", "fast"),
    "tokenizer_revision": (),
    "generation_config": ("auto",),
    "override_generation_config": ({},),
    "logits_processors": ([],),
    "logits_processor_pattern": (),
    "logprobs_mode": ("raw_logprobs",),
    "structured_outputs_config": ({}, {"backend": "auto"}, {"backend": "guidance"}, {"backend": "xgrammar"}),
    "scheduling_policy": ("fcfs", "priority"),
    # another task
    "task": ("auto", "generate"),
    "runner": ("auto", "generate"),
    "convert": ("auto", "none"),
    "pooler_config": (),
    "diffusion_config": (),
    "enable_lora": (False,),
    "enable_prompt_adapter": (False,),
    # other devices, processes or code
    "pipeline_parallel_size": (1,),
    "data_parallel_size": (1,),
    "data_parallel_size_local": (1,),
    "data_parallel_rank": (0,),
    "prefill_context_parallel_size": (1,),
    "decode_context_parallel_size": (1,),
    "nnodes": (1,),
    "node_rank": (0,),
    "kv_cache_memory_bytes": (),
    "kv_transfer_config": (),
    "ec_transfer_config": (),
    "worker_cls": ("auto",),
    "worker_extension_cls": ("",),
    "scheduler_cls": (),
    "io_processor_plugin": (),
    "additional_config": ({},),
    # other metrics: `telemetry.dialects` reads it
    "disable_log_stats": (True, False),
}

# Where the model's files are; `_refusals` and `_downloaded` read them.
LOCATING = frozenset({"tokenizer", "revision", "download_dir"})

# Why: which.
IDLE: dict[str, str] = {
    "its requests are refused, or it has no input here": """
        tokens_only skip_tokenizer_init enable_prompt_embeds enable_return_routed_experts allowed_local_media_path
        allowed_media_domains language_model_only limit_mm_per_prompt enable_mm_embeds interleave_mm_strings
        media_io_kwargs mm_processor_kwargs mm_processor_cache_gb mm_processor_cache_type
        mm_shm_cache_max_object_size_mb mm_encoder_only mm_encoder_tp_mode mm_encoder_attn_backend
        mm_encoder_attn_dtype mm_encoder_fp8_scale_path mm_encoder_fp8_scale_save_path
        mm_encoder_fp8_scale_save_margin skip_mm_profiling video_pruning_rate mm_tensor_ipc mm_ipc_gpu_memory_gb
        disable_chunked_mm_input disable_mm_preprocessor_cache enable_mm_processor_stats renderer_num_workers
        max_logprobs
    """,
    "weights stay in the device's memory, KV pages too or below it, in pages of its own size": """
        block_size swap_space cpu_offload_gb cpu_offload_params offload_backend offload_group_size
        offload_num_in_group offload_prefetch_step offload_params kv_offloading_backend
        prefix_caching_hash_algo prefix_match_unit kv_sharing_fast_prefill calculate_kv_scales
        kv_cache_dtype_skip_layers disable_hybrid_kv_cache_manager enable_sleep_mode
        enable_cumem_allocator
    """,
    "the scheduler is another one": """
        enable_chunked_prefill max_num_partial_prefills max_long_partial_prefills max_num_scheduled_tokens
        scheduler_reserve_full_isl prefill_schedule_interval watermark stream_interval preemption_mode
        num_scheduler_steps multi_step_stream_outputs scheduler_delay_factor num_lookahead_slots use_v2_block_manager
    """,
    "there is no speculative decoding": """
        speculative_config spec_method spec_model spec_tokens speculative_model num_speculative_tokens
    """,
    "kernels, CUDA graphs and their tuning are this engine's own": """
        cudagraph_capture_sizes max_cudagraph_capture_size cuda_graph_sizes max_seq_len_to_capture
        max_context_len_to_capture compilation_config optimization_level performance_mode kernel_config
        attention_config attention_backend ir_op_priority moe_backend linear_backend all2all_backend
        enable_flashinfer_autotune enable_bf16x3_router_gemm gdn_prefill_backend use_fp64_gumbel disable_cascade_attn
        jit_monitor_mode jit_monitor_verbose mamba_config mamba_cache_dtype mamba_ssm_cache_dtype mamba_block_size
        mamba_cache_mode mamba_backend enable_mamba_cache_stochastic_rounding mamba_cache_philox_rounds
    """,
    "one engine has one process for each of its GPUs, started by itself": """
        distributed_executor_backend worker_use_ray ray_workers_use_nsight master_addr master_port
        distributed_timeout_seconds cpu_distributed_timeout_seconds numa_bind numa_bind_nodes numa_bind_cpus
        disable_custom_all_reduce disable_nccl_for_dp_synchronization dcp_comm_backend dcp_kv_cache_interleave_size
        cp_kv_cache_interleave_size data_parallel_start_rank data_parallel_address data_parallel_rpc_port
        data_parallel_hybrid_lb data_parallel_external_lb data_parallel_multi_port_external_lb data_parallel_backend
        enable_expert_parallel enable_ep_weight_filter enable_elastic_ep enable_dbo ubatch_size
        dbo_decode_token_threshold dbo_prefill_token_threshold eplb_config enable_eplb expert_placement_strategy
        shutdown_timeout
    """,
    "it belongs to what is switched off": """
        max_loras max_lora_rank max_cpu_loras lora_dtype lora_extra_vocab_size lora_target_modules default_mm_loras
        fully_sharded_loras enable_tower_connector_lora specialize_active_lora enable_mixed_moe_lora_format
        enable_moe_shared_loras allow_deprecated_quantization reasoning_parser reasoning_parser_plugin
        reasoning_config guided_decoding_backend weight_transfer_config
    """,
    "nothing is downloaded, no code of a model is run, and all its safetensors are read": """
        trust_remote_code hf_token code_revision max_parallel_loading_workers safetensors_load_strategy
        safetensors_prefetch_num_threads safetensors_prefetch_block_size model_loader_extra_config ignore_patterns
        use_tqdm_on_load pt_load_map_location
    """,
    "names, logs, metrics and traces are the server's or have switches of their own": """
        served_model_name disable_log_requests enable_log_requests max_log_len
        aggregate_engine_logging otlp_traces_endpoint collect_detailed_traces show_hidden_metrics_for_version
        kv_cache_metrics kv_cache_metrics_sample cudagraph_metrics enable_layerwise_nvtx_tracing enable_mfu_metrics
        enable_logging_iteration_details profiler_config fail_on_environ_validation
    """,
}

KNOWN = TRANSLATED.keys() | DECISIVE.keys() | LOCATING | set(" ".join(IDLE.values()).split())
