"""This module collects the GPU's kernels, under the names and signatures of reference and reference_sampling.py.

A kernel is called as `kernel(*inputs, *parameters, out=outputs, **attributes)`; each operation of the graph also takes
`num_sms`: how many SMs the launch may fill (None: all). All can be captured in a CUDA graph: grids depend on shapes
alone, nothing waits for the device, and what workspace they need comes from torch's allocator. The first call of a
kind compiles: run it before a capture.

A batch may be padded: a row at position -1 (of any slot that exists) appends nothing to pages and attends to nothing;
its outputs are finite where its inputs are, and no other row sees them.

`attention` plans its work on the device from positions and slots. `plan_attention` does that once for all layers, and
its result is passed as `plan`.

Kernels on few rows start while the kernel before them on their stream ends (pdl.py). So no kernel that runs directly
before one that reads positions, slots, page table or `plan` may write them.
"""

from collections.abc import Iterable

from nanoflow_kernels.attention.paged import attention
from nanoflow_kernels.attention.plan import AttentionPlan, plan_attention
from nanoflow_kernels.collectives.timed_exchange import timed_exchange
from nanoflow_kernels.embed import embed
from nanoflow_kernels.gemm.dense import linear, linear_swiglu
from nanoflow_kernels.gemm.scaled import scaled_linear, scaled_linear_swiglu
from nanoflow_kernels.moe import (
    grouped_combine,
    grouped_linear_swiglu,
    scaled_grouped_combine,
    scaled_grouped_linear_swiglu,
)
from nanoflow_kernels.norm import add_rms_norm, add_rms_norm_quantise
from nanoflow_kernels.quantise import quantise, swiglu_quantise
from nanoflow_kernels.rope import norm_rope_append, rope_append
from nanoflow_kernels.route import route
from nanoflow_kernels.sampling import greedy, logprobs, mask, penalise, sample

# What each operation's kernel is and why, for people. Figures: one H200, benchmarks/results/kernels_h200.json,
# kernels_fp8_h200.json, kernels_small_m_h200.json and peer_flashinfer_h200.json.
IMPLEMENTATIONS = {
    "embed": "our gather, which writes both streams in one pass",
    "add_rms_norm": "our kernel: residual, sum and norm in one pass",
    "linear": (
        "cuBLAS: as fast as our persistent kernel on full tiles, faster on others; up to 128 tokens our own, "
        "which reads weights 4 to 19 % faster up to 32 and starts early; on few SMs the persistent one, for cuBLAS "
        "loses more than its share there"
    ),
    "linear_swiglu": "our persistent kernel: SwiGLU in the epilogue, in the time of cuBLAS's product without it",
    "quantise": "our kernel: amax, scale and rounding in one pass",
    "add_rms_norm_quantise": "our kernel: add_rms_norm and quantise in one pass",
    "swiglu_quantise": "our kernel: SwiGLU and quantise in one pass",
    "scaled_linear": (
        "our persistent kernel, as fast as cuBLAS with fast accumulation; up to 128 tokens the one that "
        "reads weights; with block scales cuBLAS, but on few SMs the persistent one"
    ),
    "scaled_linear_swiglu": (
        "our persistent kernel: SwiGLU in the epilogue, in less time than cuBLAS's product without it and without fast "
        "accumulation"
    ),
    "rope_append": "our kernel: rotation and append to the pages in one pass",
    "norm_rope_append": "our kernel: the norm of every head, rotation and append to the pages in one pass",
    "attention": (
        "our kernels: one grid for every mix of decodes and chunks, so one CUDA graph a bucket; decode at 0.99 of "
        "FlashInfer's rate, prefill at 0.79 to 0.86 of FlashAttention-3's, which is 3 % of a step"
    ),
    "route": "our kernel: softmax and choice in one pass",
    "grouped_linear_swiglu": "our grouped product: rows are sorted by expert on the device, SwiGLU in the epilogue",
    "grouped_combine": "our grouped product: rows are sorted by expert on the device",
    "scaled_grouped_linear_swiglu": "our grouped product, of FP8 operands",
    "scaled_grouped_combine": "our grouped product, of FP8 operands",
}


def describe_implementations(uses: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each kernel that has a note above: its operations, what runs them and why.

    uses: (name of a kernel, name of an operation that uses it), in the order in which lines are wanted.
    """
    operations: dict[str, list[str]] = {}
    for kernel, operation in uses:
        operations.setdefault(kernel, []).append(operation)
    return [
        f"{kernel} ({', '.join(names)}): {IMPLEMENTATIONS[kernel]}"
        for kernel, names in operations.items()
        if kernel in IMPLEMENTATIONS
    ]


__all__ = [
    "IMPLEMENTATIONS",
    "AttentionPlan",
    "add_rms_norm",
    "add_rms_norm_quantise",
    "attention",
    "describe_implementations",
    "embed",
    "greedy",
    "grouped_combine",
    "grouped_linear_swiglu",
    "linear",
    "linear_swiglu",
    "logprobs",
    "mask",
    "norm_rope_append",
    "penalise",
    "plan_attention",
    "quantise",
    "rope_append",
    "route",
    "sample",
    "scaled_grouped_combine",
    "scaled_grouped_linear_swiglu",
    "scaled_linear",
    "scaled_linear_swiglu",
    "swiglu_quantise",
    "timed_exchange",
]
