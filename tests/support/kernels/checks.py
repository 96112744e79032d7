"""Checks of every device kernel against its reference, the same in the interpreter and on a device.

Operands are the left columns of wider, NaN filled matrices, and outputs are poisoned, as they are in a program. Sizes
are prime where they can be. Each check compares with the reference computed in fp32 on the CPU from the same inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from nanoflow_kernels import device as kernels
from nanoflow_kernels import reference, reference_sampling
from support.comparison import assert_close
from torch import Tensor

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
E4M3 = torch.float8_e4m3fn
FLIPS = 1e-3  # of values in e4m3 may be the next one: those that lie half-way but for an fp32 rounding
NEIGHBOURS = 16  # poisoned columns beside an operand: rows still begin at multiples of 16 bytes
Request = tuple[int, int]  # tokens in its pages before, tokens in this nano-batch


class Checks:
    """The checks on one device and dtype, from one seed."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype, self.tolerance = device, dtype, TOLERANCE[dtype]
        self.random = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.random).to(dtype or self.dtype)

    def there(self, tensor: Tensor) -> Tensor:
        """On the device; a matrix there is part of a wider one."""
        if tensor.ndim != 2:
            return tensor.to(self.device)
        wide = poisoned(tensor.shape[0], tensor.shape[1] + NEIGHBOURS, tensor.dtype).to(self.device)
        wide[:, : tensor.shape[1]] = tensor
        return wide[:, : tensor.shape[1]]

    def empty(self, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.there(poisoned(rows, columns, dtype or self.dtype))

    def close(self, quantity: str, actual: Tensor, expected: Tensor) -> None:
        assert_close(quantity, actual.cpu(), expected, self.tolerance)
        assert_untouched_beside(quantity, actual)

    def embed(self, tokens: int, width: int) -> None:
        table, ids = self.normal(11, width), torch.randint(11, (tokens,), dtype=torch.int32, generator=self.random)
        residual, update = self.empty(tokens, width), self.empty(tokens, width)
        kernels.embed(self.there(ids), self.there(table), out=(residual, update))
        assert torch.equal(residual.cpu(), torch.zeros(tokens, width, dtype=self.dtype))
        assert torch.equal(update.cpu(), table[ids.long()])

    def timed_exchange(
        self, taken: tuple[int, int], given: tuple[int, int], num_sms: int | None, us: float = 0.0
    ) -> None:
        x, out, expected = self.normal(*taken), self.empty(*given), torch.empty(given)
        kernels.timed_exchange(self.there(x), out=out, scale=1.25, us=us, num_sms=num_sms)
        reference.timed_exchange(x.float(), out=expected, scale=1.25, us=0.0)
        self.close("exchanged", out, expected)

    def add_rms_norm(self, tokens: int, width: int) -> None:
        inputs = self.normal(tokens, width), self.normal(tokens, width), self.normal(width)
        kept, normed = self.empty(tokens, width), self.empty(tokens, width)
        kernels.add_rms_norm(*map(self.there, inputs), eps=1e-5, out=(kept, normed))
        expected = torch.empty(tokens, width, dtype=self.dtype), torch.empty(tokens, width)
        reference.add_rms_norm(*inputs, eps=1e-5, out=expected)
        assert torch.equal(kept.cpu(), expected[0])
        self.close("norm", normed, expected[1])

    def linear(
        self, tokens: int, bias: bool, wide_output: bool, num_sms: int | None = None, inner: int = 24, width: int = 40
    ) -> None:
        x, weight = self.normal(tokens, inner), self.normal(width, inner)
        parameters = [weight, *([self.normal(width)] if bias else [])]
        out = self.empty(tokens, width, torch.float32 if wide_output else None)
        kernels.linear(self.there(x), *map(self.there, parameters), out=out, num_sms=num_sms)
        expected = torch.empty(tokens, width)
        reference.linear(x.float(), *(p.float() for p in parameters), out=expected)
        assert_close("linear", out.cpu(), expected, 2e-6 if wide_output else self.tolerance)

    def linear_swiglu(self, tokens: int, inner: int, width: int, num_sms: int | None = None) -> None:
        x, weight = self.normal(tokens, inner), self.normal(2 * width, inner) / inner**0.5
        out, expected = self.empty(tokens, width), torch.empty(tokens, width)
        kernels.linear_swiglu(self.there(x), self.there(weight), out=out, num_sms=num_sms)
        reference.linear_swiglu(x.float(), weight.float(), out=expected)
        self.close("linear_swiglu", out, expected)

    def rope_append(
        self,
        mix: Sequence[Request],
        heads: int,
        kv_heads: int,
        head_dim: int,
        page_tokens: int,
        padding: int = 0,
        kv_scales: Sequence[float] | None = None,
        normed: bool = False,
        attention_factor: float = 1.0,
        pairs: int | None = None,
    ) -> None:
        """`kv_scales`: into pages of e4m3, with these scales. `normed`: norm_rope_append. `pairs`: that are rotated."""
        positions, slots, table, num_pages = paged_batch(mix, page_tokens, padding, self.random)
        real = len(positions) - padding
        qkv = self.normal(len(positions), (heads + 2 * kv_heads) * head_dim)
        frequencies = torch.rand(pairs or head_dim // 2, generator=self.random)
        shape = (num_pages, 2, kv_heads, page_tokens, head_dim)
        scales = [] if kv_scales is None else [torch.tensor(kv_scales)]
        pages = torch.full(shape, torch.nan).to(E4M3 if scales else self.dtype).to(self.device)
        expected_pages = torch.full(shape, torch.nan).to(E4M3 if scales else torch.float32)
        q, expected = self.empty(len(positions), heads * head_dim), torch.empty(real, heads * head_dim)
        rows = (positions, slots, table)
        norms = [self.normal(head_dim) for _ in "qk"] if normed else []
        name, options = ("norm_rope_append", {"eps": 1e-2}) if normed else ("rope_append", {})
        options["attention_factor"] = attention_factor
        parameters = (frequencies, *norms, *scales)
        getattr(kernels, name)(self.there(qkv), *map(self.there, (*rows, *parameters)), out=(q, pages), **options)
        rows = (positions[:real], slots[:real], table)
        getattr(reference, name)(qkv[:real].float(), *rows, *parameters, out=(expected, expected_pages), **options)
        self.close("q", q[:real], expected)
        assert not q.isnan().any(), "padding made NaN"
        written = ~expected_pages.isnan()
        assert torch.equal(~pages.cpu().isnan(), written), "pages: other places were written"
        if scales:
            assert_same_steps("pages", pages.cpu()[written], expected_pages[written])
        else:
            assert_close("pages", pages.cpu()[written], expected_pages[written], self.tolerance)

    def attention(
        self,
        mix: Sequence[Request],
        heads: int,
        kv_heads: int,
        head_dim: int,
        page_tokens: int,
        padding: int = 0,
        num_sms: int | None = None,
        kv_scales: Sequence[float] | None = None,
        window: int = 0,
    ) -> None:
        """`kv_scales`: over pages of e4m3, with these scales. Queries are such that their scores are of size 1."""
        positions, slots, table, num_pages = paged_batch(mix, page_tokens, padding, self.random)
        real = len(positions) - padding
        scales = [] if kv_scales is None else [torch.tensor(kv_scales)]
        pages = torch.full((num_pages, 2, kv_heads, page_tokens, head_dim), torch.nan)
        pages = pages.to(E4M3 if scales else self.dtype)
        for slot in slots[:real].unique().tolist():  # of what no token may see, all stays NaN
            length = int(positions[:real][slots[:real] == slot].max()) + 1
            where = torch.arange(length)
            kv = self.normal(length, 2, kv_heads, head_dim, dtype=pages.dtype)
            pages[table[slot, where // page_tokens].long(), :, :, where % page_tokens] = kv
        q = self.normal(len(positions), heads * head_dim) / (kv_scales[0] if kv_scales else 1)
        out, expected = self.empty(len(positions), heads * head_dim), torch.empty(real, heads * head_dim)
        operands = *map(self.there, (positions, slots, table)), *map(self.there, scales)
        kernels.attention(self.there(q), pages.to(self.device), *operands, window=window, out=out, num_sms=num_sms)
        reference.attention(
            q[:real].float(), pages, positions[:real], slots[:real], table, *scales, window=window, out=expected
        )
        self.close("attention", out[:real], expected)
        assert not out[real:].any(), "padding is not zero"

    def route(self, tokens: int, experts: int, chosen: int, renormalise: bool = True) -> None:
        logits = self.normal(tokens, experts, dtype=torch.float32)
        logits[:1] = 1.0  # equals: lower ids first
        out = self.empty(tokens, chosen, torch.int32), self.empty(tokens, chosen, torch.float32)
        expected = torch.empty(tokens, chosen, dtype=torch.int32), torch.empty(tokens, chosen)
        kernels.route(self.there(logits), renormalise=renormalise, out=out)
        reference.route(logits, renormalise=renormalise, out=expected)
        assert torch.equal(out[0].cpu(), expected[0])
        assert_close("weights", out[1].cpu(), expected[1], 1e-6)

    def grouped(self, tokens: int, count: int, chosen: int, inner: int, width: int, unused: int = 1) -> None:
        """Both products. The last `unused` experts are chosen by nobody."""
        ranked = torch.rand(tokens, count - unused, generator=self.random).argsort(1)
        experts, weight = ranked[:, :chosen].int(), self.normal(count, 2 * width, inner)
        x, out = self.normal(tokens, inner), self.empty(tokens, chosen * width)
        expected = torch.empty(tokens, chosen * width)
        kernels.grouped_linear_swiglu(self.there(x), self.there(experts), weight.to(self.device), out=out)
        reference.grouped_linear_swiglu(x.float(), experts, weight.float(), out=expected)
        self.close("grouped_linear_swiglu", out, expected)

        weight = self.normal(count, width, inner)
        x, scale = self.normal(tokens, chosen * inner), self.normal(tokens, chosen, dtype=torch.float32)
        out, expected = self.empty(tokens, width), torch.empty(tokens, width)
        kernels.grouped_combine(*map(self.there, (x, experts, scale)), weight.to(self.device), out=out)
        reference.grouped_combine(x, experts, scale, weight, out=expected)
        self.close("grouped_combine", out, expected)

    def sample(self, rows: int, vocabulary: int) -> None:
        """Every way to sample, in one batch: with equals at the thresholds, zeros of both signs and excluded ids."""
        logits = self.normal(rows, vocabulary, dtype=torch.float32) * 3
        logits[:, ::3] = logits[:, ::3].round()
        logits[::2, : vocabulary // 4] = -torch.inf
        ways = [torch.arange(rows) % n for n in (4, 5, 7)]
        columns = (
            torch.tensor([0, 0.5, 1, 2], dtype=torch.float64)[ways[0]],
            torch.tensor([0, 1, 5, 17, 2**40])[ways[1]],
            torch.tensor([1, 0.9, 0.3, 1e-9, 0.99, 0.7, 1], dtype=torch.float64)[ways[2]],
            torch.tensor([0, 0.03, 0], dtype=torch.float64)[torch.arange(rows) % 3],
            torch.randint(2**62, (rows,), generator=self.random),
            torch.randint(2**31, (rows,), generator=self.random),
        )
        ids = kernels.sample(self.there(logits), *map(self.there, columns))
        assert ids.tolist() == reference_sampling.sample(logits, *columns).tolist()
        assert kernels.greedy(self.there(logits)).tolist() == reference_sampling.greedy(logits).tolist()

    def penalise(self, rows: int, penalised: int, vocabulary: int) -> None:
        """Some rows of the logits, in any order, by some entries of the table."""
        logits = self.normal(rows, vocabulary, dtype=torch.float32) * 3
        logits[::2, : vocabulary // 4] = -torch.inf
        entries = torch.randperm(penalised + 2, generator=self.random)[:penalised]
        seen = torch.randint(-3, 4, (penalised + 2, vocabulary), generator=self.random).clamp(min=0)
        seen += (torch.rand(seen.shape, generator=self.random) < 0.2) * reference_sampling.IN_PROMPT
        seen = seen.to(torch.int32)
        chosen = torch.randperm(rows, generator=self.random)[:penalised]
        penalties = [torch.rand(penalised, generator=self.random) * 2 + low for low in (0.1, -1.0, -1.0)]
        changed = self.there(logits)
        kernels.penalise(
            changed, *map(self.there, (chosen, seen, entries)), *(penalty.to(self.device) for penalty in penalties)
        )
        reference_sampling.penalise(logits, chosen, seen, entries, *penalties)
        possible = logits > -torch.inf
        assert (changed.cpu() > -torch.inf).equal(possible)
        assert_close("penalise", changed.cpu()[possible], logits[possible], self.tolerance)
        assert_untouched_beside("penalise", changed)

    def mask(self, rows: int, masked: int, vocabulary: int) -> None:
        """Some rows, with more words than the vocabulary needs; the other rows stay as they are."""
        logits = self.normal(rows, vocabulary, dtype=torch.float32)
        allowed = torch.randint(-(2**31), 2**31, (masked, vocabulary // 32 + 2), generator=self.random).to(torch.int32)
        chosen = torch.randperm(rows, generator=self.random)[:masked]
        changed = self.there(logits)
        kernels.mask(changed, self.there(chosen), self.there(allowed))
        reference_sampling.mask(logits, chosen, allowed)
        assert changed.cpu().equal(logits)
        assert_untouched_beside("mask", changed)
        for row, words in zip(chosen.tolist(), allowed.tolist(), strict=True):
            kept = [token for token in range(vocabulary) if words[token // 32] >> token % 32 & 1]
            assert torch.where(logits[row] > -torch.inf)[0].tolist() == kept


def poisoned(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.full((rows, columns), torch.nan if dtype.is_floating_point else torch.iinfo(dtype).min, dtype=dtype)


def assert_same_steps(quantity: str, actual: Tensor, expected: Tensor) -> None:
    """e4m3 of the same values, but for few that are the next one."""
    assert not actual.isnan().any(), f"{quantity}: some are NaN"
    steps = [bits.view(torch.int8).int() for bits in (actual.contiguous(), expected.contiguous())]
    steps = [torch.where(bits < 0, -(bits & 0x7F), bits) for bits in steps]
    apart = (steps[0] - steps[1]).abs()
    assert (apart <= 1).all(), f"{quantity}: {apart.max()} steps apart"
    assert apart.sum() <= max(1, FLIPS * apart.numel()), f"{quantity}: {apart.sum()} of {apart.numel()} differ"


def assert_untouched_beside(quantity: str, output: Tensor) -> None:
    """An output of Checks.empty, whole rows from the first: the poison beside it is still there."""
    rows, columns = output.shape
    wide = output.as_strided((rows, columns + NEIGHBOURS), (columns + NEIGHBOURS, 1))
    assert wide[:, columns:].cpu().isnan().all(), f"{quantity}: columns beside the output were written"


def paged_batch(
    mix: Sequence[Request], page_tokens: int, padding: int, random: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, int]:
    """positions [T], slots [T], page_table [S, N] with unset entries, and the number of pages; rows of padding last."""
    num_slots = len(mix) + 2
    used = [-(-(past + new) // page_tokens) for past, new in mix]
    order = torch.randperm(num_slots, generator=random).tolist()  # requests sit in any slots, their pages are anywhere
    num_pages = sum(used) + 3
    pages = torch.randperm(num_pages, generator=random).to(torch.int32)
    table = torch.full((num_slots, max(used, default=0) + 1), -1, dtype=torch.int32)
    positions, slots, taken = [], [], 0
    for slot, (past, new), count in zip(order, mix, used, strict=False):
        positions += range(past, past + new)
        slots += [slot] * new
        table[slot, :count] = pages[taken : taken + count]
        taken += count
    positions += [-1] * padding
    slots += [slots[-1] if slots else 0] * padding  # the hardest: it looks like more of the last request
    return torch.tensor(positions, dtype=torch.int32), torch.tensor(slots, dtype=torch.int32), table, num_pages
