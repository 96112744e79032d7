"""Those who read our metrics page, each by the rules of its own code, with the names that it looks for by default.

* Endpoint picker: of the Gateway API inference extension and of llm-d (pkg/epp/datalayer/metrics/spec.go there). It
  takes the first series of a name with the labels of its specification, as a gauge or a counter.
* vLLM's router: of vLLM's production stack (src/vllm_router/stats/engine_stats.py). The last series of a name counts.
  It also looks for names that vLLM has given up (gpu_...), and takes 0 where there are none, as here.
* Load headers: src/orca_http.cc of Triton, for clients that ask with `endpoint-load-metrics-format`.
* Queries of Prometheus: of KServe's page on autoscaling, of KEDA's with vLLM's production stack, and vLLM's dashboard.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import promql_parser

Labels = dict[str, str]


class Family(NamedTuple):
    kind: str
    series: list[tuple[Labels, float]]


class Reader(NamedTuple):
    """`read` gives what it knows of an engine then, by its own words; LookupError: the page lacks a name."""

    dialect: str
    names: tuple[str, ...]
    read: Callable[[str], dict[str, float]]


def families(page: str) -> dict[str, Family]:
    """As Prometheus' own parser takes a page apart: a type that is said twice is an error."""
    found: dict[str, Family] = {}
    for line in page.splitlines():
        if match := re.fullmatch(r"# TYPE ([a-zA-Z_:][\w:]*) (\w+)", line):
            assert match[1] not in found, f"second TYPE line for {match[1]}"
            found[match[1]] = Family(match[2], [])
        elif line and not line.startswith("#"):
            name, labels, value = re.fullmatch(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)", line).groups()
            pairs = dict(re.findall(r'(\w+)="([^"]*)"', labels or ""))
            found.setdefault(name, Family("untyped", [])).series.append((pairs, float(value)))
    return found


def pick(page: str, specifications: dict[str, str], info: str | None = None) -> dict[str, float]:
    """The endpoint picker. `info`: of the metric whose labels are the sizes of the cache."""
    found = families(page)
    picked = {}
    for what, specification in specifications.items():
        name, wanted = re.fullmatch(r"([\w:]+)(?:\{(\w+=\w+)\})?", specification).groups()
        labels = dict([wanted.split("=")]) if wanted else {}
        family = found[name]
        assert family.kind in ("gauge", "counter"), f"the picker reads 0 from a {family.kind}"
        values = [value for of_series, value in family.series if labels.items() <= of_series.items()]
        picked[what] = values[0]
    if info is not None:
        labels = found[info].series[0][0]
        picked |= {"block size": int(labels["block_size"]), "blocks": int(labels["num_gpu_blocks"])}
    return picked


def route(page: str) -> dict[str, float]:
    """vLLM's router. It would take 0 for a name that is missing; that is what must not be."""
    found = families(page)
    names = {"running": "vllm:num_requests_running", "waiting": "vllm:num_requests_waiting"}
    return {what: found[name].series[-1][1] for what, name in names.items()}


def orca(page: str) -> dict[str, float]:
    """Load headers, to the expression."""
    found = re.findall(r"nv_trt_llm_kv_cache_block_metrics(?:{(.*?)})?\s*(\d+(?:\.\d+)?)", page)
    blocks = {dict(re.findall(r'(\w+)="([^"]*)"', labels)).get("kv_cache_block_type"): float(n) for labels, n in found}
    return {
        "kv_cache_utilization": blocks["used"] / blocks["max"],
        "max_token_capacity": int(blocks["max"] * blocks["tokens_per"]),
    }


def query(page: str, queries: tuple[str, ...]) -> dict[str, float]:
    """Prometheus: what each selector of the queries finds, summed over its series."""
    found = families(page)
    sums = {}
    for selector in (selector for text in queries for selector in _selectors(promql_parser.parse(text))):
        labels = {matcher.name: matcher.value for matcher in selector.matchers.matchers}
        values = [value for of_series, value in found[selector.name].series if labels.items() <= of_series.items()]
        if not values:
            raise LookupError(f"{selector.name}: no series with {labels}")
        sums[selector.name] = sum(values)
    return sums


def _selectors(expression: Any) -> Iterator[Any]:
    if isinstance(expression, promql_parser.VectorSelector):
        yield expression
    for name in ("vector_selector", "expr", "lhs", "rhs"):
        if (inner := getattr(expression, name, None)) is not None:
            yield from _selectors(inner)
    for inner in getattr(expression, "args", None) or ():
        yield from _selectors(inner)


VLLM_SPECIFICATIONS = {
    "waiting": "vllm:num_requests_waiting",
    "running": "vllm:num_requests_running",
    "KV use": "vllm:kv_cache_usage_perc",
}
TRTLLM_SPECIFICATIONS = {
    "waiting": "nv_trt_llm_request_metrics{request_type=waiting}",
    "running": "nv_trt_llm_request_metrics{request_type=scheduled}",
    "KV use": "nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=fraction}",
    "block size": "nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=tokens_per}",
    "blocks": "nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=max}",
}
_RATED = ("prompt_tokens_total", "generation_tokens_total")
_TIMES = ("time_to_first_token", "inter_token_latency", "e2e_request_latency")
_SUMS = ("request_queue_time", "request_prefill_time", "request_decode_time")
DASHBOARD = (
    *(f'vllm:{name}{{model_name="m"}}' for name in ("num_requests_running", "num_requests_waiting")),
    'vllm:kv_cache_usage_perc{model_name="m"}',
    *(f'rate(vllm:{name}{{model_name="m"}}[5m])' for name in _RATED),
    *(
        f'histogram_quantile(0.99, sum by(le) (rate(vllm:{name}_seconds_bucket{{model_name="m"}}[5m])))'
        for name in _TIMES
    ),
    *(
        f'rate(vllm:{name}_seconds_sum{{model_name="m"}}[5m]) / rate(vllm:{name}_seconds_count{{model_name="m"}}[5m])'
        for name in _TIMES
    ),
    *(f'rate(vllm:{name}_seconds_sum{{model_name="m"}}[5m])' for name in _SUMS),
    'sum by(le) (increase(vllm:request_prompt_tokens_bucket{model_name="m"}[5m]))',
    'sum by(le) (increase(vllm:request_generation_tokens_bucket{model_name="m"}[5m]))',
    'sum by(finished_reason) (increase(vllm:request_success_total{model_name="m"}[5m]))',
)
_LATENCIES = tuple(f"vllm:{name}_seconds" for name in (*_TIMES, *_SUMS))

READERS = {
    "endpoint picker, engine `vllm`": Reader(
        "vllm",
        (*VLLM_SPECIFICATIONS.values(), "vllm:cache_config_info"),
        partial(pick, specifications=VLLM_SPECIFICATIONS, info="vllm:cache_config_info"),
    ),
    "endpoint picker, engine `triton-tensorrt-llm`": Reader(
        "trtllm",
        ("nv_trt_llm_request_metrics", "nv_trt_llm_kv_cache_block_metrics"),
        partial(pick, specifications=TRTLLM_SPECIFICATIONS),
    ),
    "vLLM's router": Reader("vllm", ("vllm:num_requests_running", "vllm:num_requests_waiting"), route),
    "Triton's load headers": Reader("nanoflow", ("nv_trt_llm_kv_cache_block_metrics",), orca),
    "KServe": Reader("vllm", ("vllm:num_requests_running",), partial(query, queries=("vllm:num_requests_running",))),
    "KEDA": Reader("vllm", ("vllm:num_requests_waiting",), partial(query, queries=("vllm:num_requests_waiting",))),
    "vLLM's dashboard": Reader(
        "vllm",
        (
            *VLLM_SPECIFICATIONS.values(),
            *(f"vllm:{name}" for name in (*_RATED, "request_success_total")),
            *_LATENCIES,
            "vllm:request_prompt_tokens",
            "vllm:request_generation_tokens",
        ),
        partial(query, queries=DASHBOARD),
    ),
}
