"""FAMILIES is the table of our own metrics on the server's page; docs/metrics.md shows it to people.

Names end as those of vLLM's metrics where it has the like; of each, the value is read from a `View`. What other engines
call the same is in `dialects`.
"""

from __future__ import annotations

from collections import Counter

from nanoflow_backend.process.messages import Stats
from nanoflow_backend.scheduler.batch import FinishReason
from nanoflow_backend.scheduler.observer import WHOLE
from nanoflow_backend.telemetry.family import Family, Values, View
from nanoflow_backend.telemetry.tier_families import TIER_FAMILIES, pages


def _usage(view: View) -> float:
    return view.load.used_pages / view.ready.num_pages


def _blocks(view: View) -> Values:
    used, most = view.load.used_pages, view.ready.num_pages
    return {
        ("max",): most,
        ("used",): used,
        ("free",): most - used,
        ("fraction",): _usage(view),
        ("tokens_per",): view.ready.page_tokens,
        ("reused",): view.stats.scheduler.prefix_hit_tokens // view.ready.page_tokens,
    }


def _whole(view: View) -> Values:
    return {(str(reason),): view.stats.observed.ended.get(reason, 0) for reason in WHOLE}


def refused_by_engine(stats: Stats) -> Counter[str]:
    """Requests that it ended otherwise than their client would have it."""
    return Counter({r: n for r, n in stats.observed.ended.items() if r not in (*WHOLE, FinishReason.CANCELLED)})


def _refused(view: View) -> Values:
    of_engine = refused_by_engine(view.stats)
    return {(reason,): view.refused[reason] + of_engine[reason] for reason in {**view.refused, **of_engine}}


# Of the TensorRT-LLM backend. The server itself reads it, so it is among ours as well.
KV_BLOCKS = Family("nv_trt_llm_kv_cache_block_metrics", "gauge", "KV pages as the server's ORCA load headers want them",
                   _blocks, ("kv_cache_block_type",), live=True)  # fmt: skip

FAMILIES = (
    Family("nanoflow_num_requests_running", "gauge", "Requests that hold KV pages",
           lambda v: v.load.running, live=True),
    Family("nanoflow_num_requests_waiting", "gauge", "Requests in the engine's queue",
           lambda v: v.load.waiting, live=True),
    Family("nanoflow_kv_cache_usage_perc", "gauge", "Share of the KV pages that requests hold; 1 is all", _usage,
           live=True),
    Family("nanoflow_kv_cache_pages", "gauge", "KV pages by tier: used by requests, cached for their content, or free",
           pages, ("tier", "state")),
    KV_BLOCKS,
    Family("nanoflow_prompt_tokens_total", "counter", "Tokens of admitted prompts, those in the prefix cache too",
           lambda v: v.stats.scheduler.prefix_query_tokens),
    Family("nanoflow_generation_tokens_total", "counter", "Tokens generated",
           lambda v: v.stats.observed.delivered_tokens),
    Family("nanoflow_computed_tokens_total", "counter", "Tokens of all steps, of prompts and of outputs",
           lambda v: v.stats.observed.computed_tokens),
    Family("nanoflow_overshoot_tokens_total", "counter", "Tokens sampled after the end of their request, never shown",
           lambda v: v.stats.scheduler.overshoot_tokens),
    Family("nanoflow_prefix_cache_queries_total", "counter", "Prompt tokens that the prefix cache might have had",
           lambda v: v.stats.scheduler.prefix_query_tokens),
    Family("nanoflow_prefix_cache_hits_total", "counter", "Prompt tokens that the prefix cache had",
           lambda v: v.stats.scheduler.prefix_hit_tokens),
    Family("nanoflow_num_preemptions_total", "counter", "Requests sent back to the queue for lack of KV pages",
           lambda v: v.stats.scheduler.preemptions),
    *TIER_FAMILIES,
    Family("nanoflow_request_success_total", "counter", "Requests with a whole result", _whole, ("finished_reason",)),
    Family("nanoflow_requests_cancelled_total", "counter", "Requests that their client gave up",
           lambda v: v.stats.observed.ended.get(FinishReason.CANCELLED, 0)),
    Family("nanoflow_time_to_first_token_seconds", "histogram", "From arrival to the first token",
           lambda v: v.stats.observed.first_token_s),
    Family("nanoflow_inter_token_latency_seconds", "histogram", "From one token of a request to its next",
           lambda v: v.stats.observed.inter_token_s),
    Family("nanoflow_e2e_request_latency_seconds", "histogram", "From arrival to the last token",
           lambda v: v.stats.observed.total_time_s),
    Family("nanoflow_request_queue_time_seconds", "histogram", "From arrival to admission",
           lambda v: v.stats.observed.queue_time_s),
    Family("nanoflow_request_prefill_time_seconds", "histogram", "From admission to the first token",
           lambda v: v.stats.observed.prefill_time_s),
    Family("nanoflow_request_decode_time_seconds", "histogram", "From the first token to the last",
           lambda v: v.stats.observed.decode_time_s),
    Family("nanoflow_request_prompt_tokens", "histogram", "Prompt tokens of a request",
           lambda v: v.stats.observed.prompt_tokens),
    Family("nanoflow_request_generation_tokens", "histogram", "Tokens generated for a request",
           lambda v: v.stats.observed.output_tokens),
    Family("nanoflow_step_time_seconds", "histogram", "Time of a step of the engine, its wait for the device included",
           lambda v: v.stats.observed.step_time_s),
    Family("nanoflow_dense_batch_fill_ratio", "histogram", "Tokens of a step over dense_batch_tokens",
           lambda v: v.stats.observed.dense_batch_fill),
    Family("nanoflow_requests_refused_total", "counter", "Requests without a result that their client did not give up",
           _refused, ("reason",), of_stub=True),
    Family("nanoflow_engine_up", "gauge", "Whether the engine process serves: 1 or 0", lambda v: v.up, of_stub=True),
    Family("nanoflow_stats_age_seconds", "gauge", "Since the engine last said how things stand, as gauges have it",
           lambda v: round(v.age_s, 1), of_stub=True),
    Family("nanoflow_engine_restarts_total", "counter", "Engine processes started in place of one that died",
           lambda v: v.restarts, of_stub=True),
)  # fmt: skip
