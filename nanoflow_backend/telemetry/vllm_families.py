"""VLLM_FAMILIES are metrics under vLLM's names, for the gateways, autoscalers and dashboards that were made for those.

They have the labels of Triton's vLLM backend, model and version, and vLLM's own, model_name and, where a value is that
of one engine, engine; all others add up over the instances of a model.
"""

from __future__ import annotations

import msgspec

from nanoflow_backend.telemetry.families import FAMILIES
from nanoflow_backend.telemetry.family import ASKED_N, Family, Values, View

OF_MODEL = ("model", "version", "model_name")
OF_ENGINE = (*OF_MODEL, "engine")
# Bounds that vLLM has too, and some between; no more than 12, whose order on the page is known (`metrics._exposition`).
FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
TOKEN_S = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
REQUEST_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)
TOKENS = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0, 131072.0)


def _called(name: str, ours: str, bounds: tuple[float, ...] | None = None) -> Family:
    """One of our families under another name."""
    (family,) = (family for family in FAMILIES if family.name == ours)
    scope = OF_ENGINE if family.kind == "gauge" else OF_MODEL
    return msgspec.structs.replace(family, name=name, bounds=bounds, scope=scope)


def _cache_config(view: View) -> Values:
    return {(str(view.ready.page_tokens), str(view.ready.num_pages)): 1}


VLLM_FAMILIES = (
    _called("vllm:num_requests_running", "nanoflow_num_requests_running"),
    _called("vllm:num_requests_waiting", "nanoflow_num_requests_waiting"),
    _called("vllm:kv_cache_usage_perc", "nanoflow_kv_cache_usage_perc"),
    Family("vllm:cache_config_info", "gauge", "The KV cache: tokens of a page and pages, as labels",
           _cache_config, ("block_size", "num_gpu_blocks"), scope=OF_ENGINE),
    _called("vllm:prompt_tokens_total", "nanoflow_prompt_tokens_total"),
    _called("vllm:generation_tokens_total", "nanoflow_generation_tokens_total"),
    _called("vllm:prefix_cache_queries_total", "nanoflow_prefix_cache_queries_total"),
    _called("vllm:prefix_cache_hits_total", "nanoflow_prefix_cache_hits_total"),
    _called("vllm:num_preemptions_total", "nanoflow_num_preemptions_total"),
    _called("vllm:request_success_total", "nanoflow_request_success_total"),
    _called("vllm:time_to_first_token_seconds", "nanoflow_time_to_first_token_seconds", FIRST_TOKEN_S),
    _called("vllm:inter_token_latency_seconds", "nanoflow_inter_token_latency_seconds", TOKEN_S),
    _called("vllm:time_per_output_token_seconds", "nanoflow_inter_token_latency_seconds", TOKEN_S),
    _called("vllm:e2e_request_latency_seconds", "nanoflow_e2e_request_latency_seconds", REQUEST_S),
    _called("vllm:request_queue_time_seconds", "nanoflow_request_queue_time_seconds", REQUEST_S),
    _called("vllm:request_prefill_time_seconds", "nanoflow_request_prefill_time_seconds", REQUEST_S),
    _called("vllm:request_decode_time_seconds", "nanoflow_request_decode_time_seconds", REQUEST_S),
    _called("vllm:request_prompt_tokens", "nanoflow_request_prompt_tokens", TOKENS),
    _called("vllm:request_generation_tokens", "nanoflow_request_generation_tokens", TOKENS),
    Family("vllm:request_params_n", "histogram", "Sequences that a prompt was asked to have, its n",
           lambda view: view.asked_n, of_stub=True, bounds=ASKED_N, scope=OF_MODEL),
)  # fmt: skip
