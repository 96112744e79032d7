"""The device's kernels, under the names and signatures of reference.py and reference_sampling.py.

`kernel(*inputs, *parameters, out=outputs, **attributes)`, and on each an optional `num_sms`: how many SMs the launch
may fill (None: all). All can be captured in a CUDA graph: grids depend on shapes alone, nothing waits for the device,
and what workspace they need comes from torch's allocator. The first call of a kind compiles: run it before a capture.

A batch may be padded: a row at position -1 (of any slot that exists) appends nothing to pages and attends to nothing;
its outputs are finite where its inputs are, and no other row sees them.

`attention` lists its work on the device from positions and slots. `list_work` does that once for all layers, and its
result is passed as `work`.
"""

from nanoflow_kernels.attention import attention
from nanoflow_kernels.attention_work import AttentionWork, list_work
from nanoflow_kernels.embed import embed
from nanoflow_kernels.gemm import linear
from nanoflow_kernels.moe import grouped_combine, grouped_linear_swiglu, route
from nanoflow_kernels.norm import add_rms_norm
from nanoflow_kernels.rope import rope_append
from nanoflow_kernels.sampling import logprobs, sample
from nanoflow_kernels.swiglu import linear_swiglu

__all__ = [
    "AttentionWork",
    "add_rms_norm",
    "attention",
    "embed",
    "grouped_combine",
    "grouped_linear_swiglu",
    "linear",
    "linear_swiglu",
    "list_work",
    "logprobs",
    "rope_append",
    "route",
    "sample",
]
