"""Products of FP8 (e4m3) operands, alone and with SwiGLU.

With a scale a row our kernels are as fast as cuBLAS with its fast accumulation, and 5 to 12 % faster than without
(Llama-3-8B on H200, 2048 tokens, sustained: qkv 86 us for 87 and 97, o 58 for 59 and 65, down 187 for 199 and 213).
With block scales cuBLAS is twice as fast, so it gets those that may fill the device
(benchmarks/results/kernels_fp8_h200.json).

Scales of activations: one a token [T, 1], or one for each 128 columns of it [T, in / 128]. Scales of a weight
[out, in]: one a row [out], or one for each block of 128 rows and columns [ceil(out / 128),
in / 128].

Shape legend: T tokens, F columns of SwiGLU's result.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from nanoflow_kernels.checks import check_bulk, check_dtype, check_rows, check_shape
from nanoflow_kernels.gemm.persistent import BLOCK_SCALES, ROW_SCALES, SCALED_BLOCK, Scales, gemm_persistent
from nanoflow_kernels.gemm.small_m import gemm_small_m, is_small_m


def scaled_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out: Tensor,
    num_sms: int | None = None,
) -> None:
    """Compute x weight^T + bias of what operands and scales stand for, summed in fp32.

    x [T, in] e4m3, weight [out, in] e4m3, scales fp32, bias [out] -> [T, out] of any floating dtype; rows of the
    matrices begin at multiples of 16 bytes.

    Raises:
        ValueError: names the operand whose shape, strides, dtype or device is not so, or num_sms if not positive.
    """
    scales = Scales(x_scale, weight_scale)
    _check("scaled_linear", x, weight, scales, out, out.shape[1])
    if len(x) == 0:
        return
    if scales.kind == BLOCK_SCALES and num_sms is None and _is_cublas(x, weight, weight_scale, bias, out):
        # cuBLAS reads the scales of x column by column.
        scale_a = x_scale.T.contiguous().T
        torch._scaled_mm(x, weight.T, scale_a, weight_scale.T, bias, out_dtype=out.dtype, out=out)
    elif scales.kind == ROW_SCALES and bias is None and is_small_m(x, weight):
        gemm_small_m(x, weight, scales, swiglu=False, out=out, num_sms=num_sms)
    else:
        gemm_persistent(x, weight, bias, scales, swiglu=False, out=out, num_sms=num_sms)


def _is_cublas(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out: Tensor) -> bool:
    """Whether cuBLAS takes these operands with block scales and is right: on Hopper, and of both operands' scales each
    column (row) must begin at a multiple of 16 bytes. torch 2.11 accepts an inner dimension of 1152, whose rows of
    scales do not, and the result is wrong by more than half.
    """
    return (
        x.device.type == "cuda"
        and torch.cuda.get_device_capability(x.device)[0] == 9
        and len(x) % 4 == 0
        and x.shape[1] % (4 * SCALED_BLOCK) == len(weight) % SCALED_BLOCK == 0
        and weight_scale.is_contiguous()
        and out.dtype == torch.bfloat16
        and (bias is None or bias.dtype == out.dtype)
    )


def scaled_linear_swiglu(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, *, out: Tensor, num_sms: int | None = None
) -> None:
    """Compute silu(gate) * up, where gates and ups take turns in the rows of the weight: one by one where it has a
    scale a row, 128 by 128 where it has blocks. The latter is half as fast as scaled_linear and swiglu_quantise.

    x [T, in] e4m3, weight [2 F, in] e4m3, scales fp32 -> [T, F] of any floating dtype; rows of the matrices begin at
    multiples of 16 bytes.

    Raises:
        ValueError: names the operand whose shape, strides, dtype or device is not so, or num_sms if not positive.
    """
    scales = Scales(x_scale, weight_scale)
    _check("scaled_linear_swiglu", x, weight, scales, out, 2 * out.shape[1])
    if scales.kind == BLOCK_SCALES and out.shape[1] % SCALED_BLOCK:
        raise ValueError(
            f"scaled_linear_swiglu: out: expected a multiple of {SCALED_BLOCK} columns for block scales, "
            f"got {out.shape[1]}"
        )
    if len(x) == 0:
        return
    if scales.kind == ROW_SCALES and is_small_m(x, weight):
        gemm_small_m(x, weight, scales, swiglu=True, out=out, num_sms=num_sms)
    else:
        gemm_persistent(x, weight, None, scales, swiglu=True, out=out, num_sms=num_sms)


def _check(kernel: str, x: Tensor, weight: Tensor, scales: Scales, out: Tensor, rows: int) -> None:
    tokens, inner = x.shape
    check_rows(kernel, x=x, weight=weight, out=out, x_scale=scales.x)
    check_dtype(kernel, torch.float8_e4m3fn, x=x, weight=weight)
    check_dtype(kernel, torch.float32, x_scale=scales.x, weight_scale=scales.weight)
    check_shape(kernel, "weight", weight, rows, inner)
    check_bulk(kernel, x=x, weight=weight, out=out)
    if scales.kind == BLOCK_SCALES:
        if inner % SCALED_BLOCK:
            raise ValueError(
                f"{kernel}: x: expected a multiple of {SCALED_BLOCK} columns for block scales, got {inner}"
            )
        blocks = inner // SCALED_BLOCK
        check_shape(kernel, "x_scale", scales.x, tokens, blocks)
        check_shape(kernel, "weight_scale", scales.weight, triton.cdiv(rows, SCALED_BLOCK), blocks)
    else:
        check_shape(kernel, "x_scale", scales.x, tokens, 1)
        check_shape(kernel, "weight_scale", scales.weight, rows)
