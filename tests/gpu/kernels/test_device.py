"""Every kernel on the device, in bf16 and fp16, against its reference in fp32 (see support.kernels.checks)."""

from __future__ import annotations

from random import Random

import pytest
import torch
from nanoflow_kernels import device as kernels
from support.kernels.checks import Checks, paged_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOKENS = (0, 1, 13, 2053)
MIXES = {
    "one decode at position 0": [(0, 1)],
    "one decode of a long request": [(30_011, 1)],
    "decodes of very different lengths": [(0, 1), (1, 1), (63, 1), (64, 1), (4099, 1), (127, 1), (128, 1)],
    "a whole prompt": [(0, 1031)],
    "chunks and decodes": [(7, 1), (1310, 1), (0, 5), (61, 300), (3, 11), (2000, 517)],
    "decodes behind a chunk": [(5, 400), (9, 1), (700, 1)],
    "few rows": [(61, 9), (1310, 1), (0, 3)],
    "nothing": [],
}
HEADS = [(4, 4), (8, 2), (16, 2), (3, 1)]  # groups of 1, 4, 8 and 3


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def checks(request: pytest.FixtureRequest) -> Checks:
    return Checks("cuda", request.param)


@pytest.mark.parametrize("tokens", TOKENS)
def test_row_kernels(checks: Checks, tokens: int) -> None:
    for width in (4099, 4096):
        checks.embed(tokens, width)
        checks.add_rms_norm(tokens, width)


@pytest.mark.parametrize(
    ("taken", "given"),
    [((389, 8192), (389, 8192)), ((389, 4096), (49, 4096)), ((49, 4096), (389, 4096)), ((13, 40), (13, 10)),
     ((13, 1031), (13, 2062)), ((0, 8), (0, 8))],
)  # fmt: skip
@pytest.mark.parametrize("num_sms", [None, 8, 999])
def test_timed_exchange(checks: Checks, taken: tuple[int, int], given: tuple[int, int], num_sms: int | None) -> None:
    checks.timed_exchange(taken, given, num_sms, us=50.0)


@pytest.mark.parametrize("us", [100, 1000])
def test_timed_exchange_takes_its_time_also_in_a_cuda_graph(us: int) -> None:
    x = torch.randn(2048, 8192, device="cuda", dtype=torch.bfloat16)
    out, graph = torch.empty_like(x), torch.cuda.CUDAGraph()
    kernels.timed_exchange(x, out=out, scale=1.0, us=us, num_sms=32)
    with torch.cuda.graph(graph):
        kernels.timed_exchange(x, out=out, scale=1.0, us=us, num_sms=32)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(20):
        graph.replay()
    end.record()
    end.synchronize()
    assert 1e3 * begin.elapsed_time(end) / 20 >= us
    assert torch.equal(out, x)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("wide_output", [False, True])
def test_linear(checks: Checks, tokens: int, bias: bool, wide_output: bool) -> None:
    checks.linear(tokens, bias, wide_output)


@pytest.mark.parametrize("tokens", [61, 389, 1024])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_on_few_sms(checks: Checks, tokens: int, bias: bool) -> None:
    for num_sms in (37, 999):
        checks.linear(tokens, bias, False, num_sms, 1032, 776)
        checks.linear(tokens, bias, False, num_sms, 193, 97)


@pytest.mark.parametrize("tokens", [*TOKENS, 61, 389])
@pytest.mark.parametrize("num_sms", [None, 37, 999])
def test_linear_swiglu(checks: Checks, tokens: int, num_sms: int | None) -> None:
    checks.linear_swiglu(tokens, 1032, 776, num_sms)
    checks.linear_swiglu(tokens, 72, 8, num_sms)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_rope_append(checks: Checks, mix: str, head_dim: int) -> None:
    for page_tokens in (7, 64):
        checks.rope_append(MIXES[mix], 8, 2, head_dim, page_tokens, padding=3)
        checks.rope_append(MIXES[mix], 8, 2, head_dim, page_tokens, padding=3, normed=True, attention_factor=1.3)
        checks.rope_append(MIXES[mix], 8, 2, head_dim, page_tokens, 3, attention_factor=1.3, pairs=3 * head_dim // 8)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("page_tokens", [7, 16, 64, 128])
def test_attention_over_poisoned_pages(checks: Checks, mix: str, head_dim: int, page_tokens: int) -> None:
    for heads, kv_heads in HEADS:
        checks.attention(MIXES[mix], heads, kv_heads, head_dim, page_tokens, padding=3)
        checks.attention(MIXES[mix], heads, kv_heads, head_dim, page_tokens, padding=3, window=70)


@pytest.mark.parametrize(("page_tokens", "num_sms"), [(16, None), (64, 1), (64, 37), (64, None), (128, 999)])
def test_attention_of_1000_requests_of_very_unequal_lengths(page_tokens: int, num_sms: int | None) -> None:
    random = Random(3)
    lengths = [min(40_000, int(random.lognormvariate(4.5, 1.5))) for _ in range(1000)]
    mix = [(length, 1) for length in lengths[:950]] + [(length, 1 + length % 61) for length in lengths[950:]]
    Checks("cuda", torch.bfloat16).attention(mix, 4, 1, 128, page_tokens, padding=13, num_sms=num_sms)


@pytest.mark.parametrize("tokens", TOKENS)
def test_experts(checks: Checks, tokens: int) -> None:
    checks.route(tokens, 8, 2)
    checks.route(tokens, 128, 8, renormalise=False)
    checks.grouped(tokens, 8, 2, 136, 264)
    checks.grouped(tokens, 128, 8, 136, 264)
    checks.grouped(tokens, 7, 3, 71, 137)


@pytest.mark.parametrize(("rows", "vocabulary"), [(0, 7), (1, 128_256), (139, 97), (281, 32_003)])
def test_sample(rows: int, vocabulary: int) -> None:
    Checks("cuda", torch.float32).sample(rows, vocabulary)


@pytest.mark.parametrize(("rows", "concerned", "vocabulary"), [(1, 0, 7), (1, 1, 128_256), (139, 70, 32_003)])
def test_edits_of_logits(rows: int, concerned: int, vocabulary: int) -> None:
    checks = Checks("cuda", torch.float32)
    checks.penalise(rows, concerned, vocabulary)
    checks.mask(rows, concerned, vocabulary)


def test_a_captured_graph_serves_every_mix() -> None:
    """Rows of one size, as decodes, chunks and padding: what was captured for one mix is right for another."""
    rows, heads, kv_heads, head_dim, page_tokens = 211, 8, 2, 128, 64
    mixes = [[(100 + i, 1) for i in range(211)], [(0, 200)], [(5000, 1), (64, 150), (9, 1)], [(0, 1)]]
    random = torch.Generator().manual_seed(1)
    pages = torch.randn(1000, 2, kv_heads, page_tokens, head_dim, generator=random).to("cuda", torch.bfloat16)
    q = torch.randn(rows, heads * head_dim, generator=random).to("cuda", torch.bfloat16)
    batches = []
    for mix in mixes:
        positions, slots, table, num_pages = paged_batch(mix, page_tokens, rows - sum(n for _, n in mix), random)
        assert num_pages <= 1000
        wide = torch.full((220, 100), -1, dtype=torch.int32)
        wide[: table.shape[0], : table.shape[1]] = table
        batches.append([tensor.cuda() for tensor in (positions, slots, wide)])
    inputs = [tensor.clone() for tensor in batches[0]]
    out, expected = torch.empty_like(q), torch.empty_like(q)
    kernels.attention(q, pages, *inputs, out=expected)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan = kernels.plan_attention(inputs[0], inputs[1], pages, heads)
        kernels.attention(q, pages, *inputs, out=out, plan=plan)
    for batch in batches:
        for tensor, new in zip(inputs, batch, strict=True):
            tensor.copy_(new)
        out.fill_(torch.nan)
        graph.replay()
        kernels.attention(q, pages, *batch, out=expected)
        assert torch.equal(out, expected)
