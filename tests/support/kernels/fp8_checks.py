"""Checks of the device kernels in FP8 against their reference, like those of `checks` and beside them."""

from __future__ import annotations

import torch
from nanoflow_kernels import device as kernels
from nanoflow_kernels import reference
from support.comparison import assert_close
from support.kernels.checks import E4M3, Checks, assert_same_steps, assert_untouched_beside
from torch import Tensor

BLOCK = 128  # rows and columns of a weight that share a scale


class Fp8Checks(Checks):
    """The checks on one device, with activations of one dtype, from one seed."""

    def quantise(self, tokens: int, width: int, group: int, upper_bound: float, static_scale: float | None) -> None:
        x = self.normal(tokens, width) * torch.logspace(-3, 2, tokens).to(self.dtype)[:, None]
        x[2:3], x[3:4, 1:] = 0, 0
        static = [] if static_scale is None else [torch.tensor([static_scale])]
        q, scale = self.outputs(tokens, width, group)
        expected = self.outputs(tokens, width, group, "cpu")
        attributes = {"group": group, "upper_bound": upper_bound}
        kernels.quantise(self.there(x), *map(self.there, static), out=(q, scale), **attributes)
        reference.quantise(x, *static, out=expected, **attributes)
        assert_close("scale", scale.cpu(), expected[1], 1e-6)
        assert (scale > 0).all()
        assert_same_steps("q", q.cpu(), expected[0])
        self.untouched(q, scale)

    def add_rms_norm_quantise(self, tokens: int, width: int, group: int, static_scale: float | None = None) -> None:
        """The two kernels one after the other: to the bit with one scale a row, else but for the order of a sum."""
        inputs = [self.there(self.normal(*shape)) for shape in ((tokens, width), (tokens, width), (width,))]
        static = [] if static_scale is None else [self.there(torch.tensor([static_scale]))]
        kept, normed = self.empty(tokens, width), self.empty(tokens, width)
        expected = self.outputs(tokens, width, group)
        kernels.add_rms_norm(*inputs, eps=1e-5, out=(kept, normed))
        kernels.quantise(normed, *static, group=group, upper_bound=2.5, out=expected)
        actual = self.empty(tokens, width), *self.outputs(tokens, width, group)
        kernels.add_rms_norm_quantise(*inputs, *static, eps=1e-5, group=group, upper_bound=2.5, out=actual)
        assert torch.equal(actual[0].cpu(), kept.cpu())
        if group:
            dequantised = [reference.dequantise(q.cpu(), scale.cpu()) for q, scale in (actual[1:], expected)]
            assert_close("norm", *dequantised, 1e-3)
        else:
            assert torch.equal(actual[1].cpu().float(), expected[0].cpu().float())
            assert torch.equal(actual[2].cpu(), expected[1].cpu())
        self.untouched(*actual)

    def swiglu_quantise(self, tokens: int, width: int, group: int, run: int, static_scale: float | None = None) -> None:
        pairs, (q, scale) = self.normal(tokens, 2 * width) * 3, self.outputs(tokens, width, group)
        static = [] if static_scale is None else [torch.tensor([static_scale])]
        expected = self.outputs(tokens, width, group, "cpu")
        kernels.swiglu_quantise(self.there(pairs), *map(self.there, static), run=run, group=group, out=(q, scale))
        reference.swiglu_quantise(pairs, *static, run=run, group=group, out=expected)
        assert_close("scale", scale.cpu(), expected[1], self.tolerance)
        # Where a scale was rounded another way, its values may be the next ones.
        dequantised = reference.dequantise(q.cpu(), scale.cpu())
        assert_close("swiglu", dequantised, reference.dequantise(*expected), max(4e-3, self.tolerance))
        self.untouched(q, scale)

    def scaled_linear(
        self, tokens: int, inner: int, width: int, *, blocks: bool, bias: bool, wide: bool, num_sms: int | None = None
    ) -> None:
        x, x_scale, weight, weight_scale = self.operands(tokens, inner, width, blocks)
        parameters = [weight, weight_scale, *([self.normal(width)] if bias else [])]
        out, expected = self.empty(tokens, width, torch.float32 if wide else None), torch.empty(tokens, width)
        kernels.scaled_linear(*map(self.there, (x, x_scale, *parameters)), out=out, num_sms=num_sms)
        reference.scaled_linear(x, x_scale, *parameters, out=expected)
        self.close_product("scaled_linear", out, expected)

    def scaled_linear_swiglu(
        self, tokens: int, inner: int, width: int, *, blocks: bool, num_sms: int | None = None
    ) -> None:
        operands = self.operands(tokens, inner, 2 * width, blocks)
        out, expected = self.empty(tokens, width), torch.empty(tokens, width)
        kernels.scaled_linear_swiglu(*map(self.there, operands), out=out, num_sms=num_sms)
        reference.scaled_linear_swiglu(*operands, out=expected)
        self.close_product("scaled_linear_swiglu", out, expected)

    def scaled_grouped(self, tokens: int, count: int, chosen: int, inner: int, width: int) -> None:
        """Both products of experts. The last expert is chosen by nobody."""
        experts = torch.rand(tokens, count - 1, generator=self.random).argsort(1)[:, :chosen].int()
        x, x_scale, weight, weight_scale = self.operands(tokens, inner, count * 2 * width, blocks=False)
        weight, weight_scale = weight.view(count, 2 * width, inner), weight_scale.view(count, 2 * width)
        out, expected = self.empty(tokens, chosen * width), torch.empty(tokens, chosen * width)
        kernels.scaled_grouped_linear_swiglu(
            *map(self.there, (x, x_scale, experts, weight)), weight_scale.to(self.device), out=out
        )
        reference.scaled_grouped_linear_swiglu(x, x_scale, experts, weight, weight_scale, out=expected)
        self.close_product("scaled_grouped_linear_swiglu", out, expected)

        x, x_scale, weight, weight_scale = self.operands(tokens * chosen, inner, count * width, blocks=False)
        x, x_scale = x.view(tokens, chosen * inner), x_scale.view(tokens, chosen)
        weight, weight_scale = weight.view(count, width, inner), weight_scale.view(count, width)
        weights = torch.rand(tokens, chosen, generator=self.random)
        out, expected = self.empty(tokens, width), torch.empty(tokens, width)
        kernels.scaled_grouped_combine(
            *map(self.there, (x, x_scale, experts, weights, weight)), weight_scale.to(self.device), out=out
        )
        reference.scaled_grouped_combine(x, x_scale, experts, weights, weight, weight_scale, out=expected)
        self.close_product("scaled_grouped_combine", out, expected)

    def operands(self, tokens: int, inner: int, width: int, blocks: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, x_scale, weight and weight_scale, whose product is of size 1."""
        x, weight = (self.normal(rows, inner, dtype=torch.float32) * 64 for rows in (tokens, width))
        groups, of_weight = (inner // BLOCK, (-(-width // BLOCK), inner // BLOCK)) if blocks else (1, (width,))
        x_scale = torch.rand(tokens, groups, generator=self.random) + 0.5
        weight_scale = torch.rand(of_weight, generator=self.random) + 0.5
        return x.to(E4M3), x_scale / 64 / inner**0.5, weight.to(E4M3), weight_scale / 64

    def close_product(self, quantity: str, actual: Tensor, expected: Tensor, factors: int = 1) -> None:
        """The tensor cores' sums of FP8 products keep fewer bits than fp32 on the device; SwiGLU multiplies two."""
        exact = actual.dtype == torch.float32 and actual.device.type == "cpu"
        assert_close(quantity, actual.cpu(), expected, 2e-6 if exact else max(2e-3 * factors**0.5, self.tolerance))
        assert_untouched_beside(quantity, actual)

    def outputs(self, tokens: int, width: int, group: int, device: str | None = None) -> tuple[Tensor, Tensor]:
        """q and scale, poisoned; of a program's own where no device is named."""
        q = torch.full((tokens, width), torch.nan).to(E4M3)
        scale = torch.full((tokens, width // group if group else 1), torch.nan)
        return (q, scale) if device else (self.there(q), self.there(scale))

    def untouched(self, *outputs: Tensor) -> None:
        for index, output in enumerate(outputs):
            assert_untouched_beside(f"output {index}", output)
