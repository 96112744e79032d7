"""TRTLLM_FAMILIES are the metrics of Triton's TensorRT-LLM backend that others read, under its names."""

from __future__ import annotations

from nanoflow_backend.telemetry.families import KV_BLOCKS
from nanoflow_backend.telemetry.family import Family, Values, View


def _requests(view: View) -> Values:
    running, most = view.load.running, view.ready.max_running
    # All that run are in every step, so what is active is scheduled.
    return {("waiting",): view.load.waiting, ("scheduled",): running, ("active",): running, ("max",): most}


TRTLLM_FAMILIES = (
    Family("nv_trt_llm_request_metrics", "gauge", "Requests that wait, that run, and that may run at a time", _requests,
           ("request_type",), live=True),
    KV_BLOCKS,
)  # fmt: skip
