"""This package defines what every kernel computes, in plain torch. The CPU program runs it; the GPU's kernels are
compared with it.

A kernel is called as `kernel(*inputs, *parameters, out=outputs, **attributes)`, in the order of the graph's Operation.
Inputs and outputs are rows of a nano-batch; outputs never overlap inputs. Math is fp32 and rounded once, to the
output's dtype. Operands are not checked: the graph has made them.

Shape legend: T tokens (rows), D hidden, H query heads, K kv heads, d head_dim, V vocabulary, E experts, k chosen
experts a token, S slots, N pages of a slot, P tokens a page. `pages` is one layer's KV: [pages, 2 (K, V), K, P, d].
Activations are [T, ...] of one dtype (fp32, fp16 or bf16); ids, positions, slots and the page table are int32.
FP8 is e4m3 (torch.float8_e4m3fn), always beside the fp32 scales that it is to be multiplied by.
"""

from nanoflow_kernels.reference.attention import attention
from nanoflow_kernels.reference.experts import grouped_combine, grouped_linear_swiglu, route
from nanoflow_kernels.reference.products import linear, linear_swiglu
from nanoflow_kernels.reference.quantised import add_rms_norm_quantise, dequantise, quantise, swiglu_quantise
from nanoflow_kernels.reference.rows import add_rms_norm, embed, norm_rope_append, rope_append
from nanoflow_kernels.reference.scaled import (
    scaled_grouped_combine,
    scaled_grouped_linear_swiglu,
    scaled_linear,
    scaled_linear_swiglu,
)
from nanoflow_kernels.reference.timed_exchange import timed_exchange

__all__ = [
    "add_rms_norm",
    "add_rms_norm_quantise",
    "attention",
    "dequantise",
    "embed",
    "grouped_combine",
    "grouped_linear_swiglu",
    "linear",
    "linear_swiglu",
    "norm_rope_append",
    "quantise",
    "rope_append",
    "route",
    "scaled_grouped_combine",
    "scaled_grouped_linear_swiglu",
    "scaled_linear",
    "scaled_linear_swiglu",
    "swiglu_quantise",
    "timed_exchange",
]
