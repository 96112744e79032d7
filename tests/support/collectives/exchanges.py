"""One collective of all ranks with its operands, and the sums that it has to give: the checks of the peer-to-peer
kernels, the same for their interpreter and a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from nanoflow_kernels.collectives import all_gather, reduce_scatter
from nanoflow_kernels.collectives.one_shot import all_reduce_one_shot
from nanoflow_kernels.collectives.peers import Peers
from nanoflow_kernels.collectives.two_shot import all_reduce_two_shot
from support.comparison import assert_close
from torch import Tensor

from nanoflow_backend.runtime.collectives.protocol import rank_rows

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
NEIGHBOURS = 16  # poisoned columns beside an operand; rows begin where vector loads like it if the operand's do
EPS = 1e-5
KERNELS: dict[str, Callable[..., None]] = {
    "all_reduce_one_shot": all_reduce_one_shot,
    "all_reduce_two_shot": all_reduce_two_shot,
    "reduce_scatter_rows": reduce_scatter.reduce_scatter_rows,
    "reduce_scatter_columns": reduce_scatter.reduce_scatter_columns,
    "all_gather_rows": all_gather.all_gather_rows,
    "all_gather_columns": all_gather.all_gather_columns,
    "reduce_scatter_add_rms_norm_all_gather": reduce_scatter.reduce_scatter_add_rms_norm_all_gather,
}


class Exchange:
    """Operands of `kernel` on ranks of T tokens and rows of D columns, seeded, each beside poison.

    Sums are known bit by bit: they are made in fp32, in the order of ranks, and rounded once. (Not in bf16 on the CPU,
    where the interpreter cuts what it should round.)
    """

    def __init__(
        self, kernel: str, ranks: int, tokens: int, width: int, dtype: torch.dtype, device: str, seed: int = 0
    ) -> None:
        self.kernel, self.ranks, self.dtype, self.device = kernel, ranks, dtype, device
        cuts = device == "cpu" and dtype == torch.bfloat16 and not kernel.startswith("all_gather")
        self._random = torch.Generator(device).manual_seed(seed)
        each = [self._normal(tokens, width) for _ in range(ranks)]
        total = each[0].float()
        for one in each[1:]:
            total = total + one.float()
        total = total.to(dtype)
        exact = torch.stack(each).double().sum(0)
        self.inputs: list[tuple[Tensor, ...]] = []
        self.exact: list[tuple[Tensor, ...]] = []  # outputs, of sums in float64
        self.expected: list[tuple[Tensor | None, ...]] = []  # bit by bit, where that is known
        residual, weight = self._normal(tokens, width), self._normal(1, width)[0]
        stream = residual.float() + total.float()
        norm = stream.to(dtype).double()
        norm = norm / (norm.square().mean(1, keepdim=True) + EPS).sqrt() * weight.double()
        for rank in range(ranks):
            mine = rank_rows(tokens, rank, ranks)
            rows, columns = slice(mine.start, mine.stop), slice(rank * width // ranks, (rank + 1) * width // ranks)
            of_kernel: dict[str, tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor | None]]] = {
                "all_reduce_one_shot": ([each[rank]], [exact], [total]),
                "all_reduce_two_shot": ([each[rank]], [exact], [total]),
                "reduce_scatter_rows": ([each[rank]], [exact[rows]], [total[rows]]),
                "reduce_scatter_columns": ([each[rank]], [exact[:, columns]], [total[:, columns]]),
                "all_gather_rows": ([total[rows]], [total.double()], [total]),
                "all_gather_columns": ([total[:, columns]], [total.double()], [total]),
                "reduce_scatter_add_rms_norm_all_gather": (
                    [residual[rows], each[rank]],
                    [residual[rows].double() + exact[rows], norm],
                    [stream[rows].to(dtype), None],
                ),
            }
            inputs, exacts, expected = of_kernel[kernel]
            self.inputs.append(tuple(self._beside_poison(one) for one in inputs))
            self.exact.append(tuple(exacts))
            self.expected.append(tuple(None if cuts else one for one in expected))
        self.parameters: dict[str, Any] = {}
        if kernel == "reduce_scatter_add_rms_norm_all_gather":
            self.inputs = [(*inputs, weight) for inputs in self.inputs]
            self.parameters["eps"] = EPS
        self.outs = [tuple(self._beside_poison(one.to(dtype)) for one in outs) for outs in self.exact]
        self.poison()

    def call(self, peers: Peers, num_sms: int | None = None) -> None:
        """Issue the call of one rank."""
        outs = self.outs[peers.rank]
        out = outs if len(outs) > 1 else outs[0]
        KERNELS[self.kernel](*self.inputs[peers.rank], peers, **self.parameters, out=out, num_sms=num_sms)

    def poison(self) -> None:
        """Outputs are NaN again."""
        for outs in self.outs:
            for out in outs:
                out.fill_(torch.nan)

    def mismatches(self, rank: int) -> Tensor:
        """[] int64, on the device: elements that are not what they should be; the host does not wait."""
        pairs = zip(self.outs[rank], self.expected[rank], strict=True)
        return torch.stack([(out != (out if one is None else one)).sum() for out, one in pairs]).sum()

    def check(self, rank: int) -> None:
        """Compare a rank's outputs with float64, bit by bit with fp32 in the order of ranks, and the poison beside."""
        where = f"{self.kernel} of rank {rank} of {self.ranks}"
        for out, exact, expected in zip(self.outs[rank], self.exact[rank], self.expected[rank], strict=True):
            assert_close(where, out.double(), exact, TOLERANCE[self.dtype])
            assert expected is None or torch.equal(out, expected), f"{where}: not the sum in the order of ranks"
            assert out._base is not None
            assert out._base[:, out.shape[1] :].isnan().all(), f"{where}: columns beside the output were written"

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._random, device=self.device).to(self.dtype)

    def _beside_poison(self, values: Tensor) -> Tensor:
        rows, columns = values.shape
        wide = torch.full((rows, columns + NEIGHBOURS), torch.nan, dtype=self.dtype, device=self.device)
        wide[:, :columns] = values
        return wide[:, :columns]
