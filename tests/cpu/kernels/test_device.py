"""Every device kernel in the kernel language's interpreter, against its reference (see support.kernels.checks).

bf16 products are wrong in the interpreter, hence fp16 and fp32; bf16 is checked on the device (tests/gpu).
"""

from __future__ import annotations

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("the kernels are compiled here: see tests/gpu", allow_module_level=True)

from nanoflow_kernels import device as kernels
from support.kernels.checks import Checks
from support.models.shapes import WITH_NORMS, config

from nanoflow_backend.graph.operation import Resource
from nanoflow_backend.models.model import build

# the interpreter's own, on conversions and on infinities that the kernels mean
pytestmark = [pytest.mark.filterwarnings(f"ignore::{name}") for name in ("DeprecationWarning", "RuntimeWarning")]
TOKENS = (0, 1, 13)
MIXES = {
    "one decode at position 0": [(0, 1)],
    "decodes of very different lengths": [(0, 1), (1, 1), (63, 1), (64, 1), (389, 1), (127, 1)],
    "a whole prompt": [(0, 139)],
    "chunks and decodes": [(7, 1), (131, 1), (0, 5), (61, 67), (3, 11)],
    "decodes behind a chunk": [(5, 40), (9, 1), (70, 1)],
    "few rows": [(61, 9), (131, 1), (0, 3)],
    "nothing": [],
}


@pytest.fixture(params=[torch.float32, torch.float16], ids=str)
def checks(request: pytest.FixtureRequest) -> Checks:
    return Checks("cpu", request.param)


@pytest.mark.parametrize("tokens", TOKENS)
def test_row_kernels(checks: Checks, tokens: int) -> None:
    checks.embed(tokens, 4099)
    checks.add_rms_norm(tokens, 1031)


@pytest.mark.parametrize(
    ("taken", "given", "num_sms"),
    [((13, 1031), (13, 1031), None), ((13, 40), (2, 40), 2), ((2, 40), (13, 40), 1), ((5, 36), (5, 9), None),
     ((5, 9), (5, 36), 2), ((8, 3), (1, 3), 99), ((5, 8201), (5, 8201), 2), ((0, 8), (0, 8), None)],
)  # fmt: skip
def test_timed_exchange(checks: Checks, taken: tuple[int, int], given: tuple[int, int], num_sms: int | None) -> None:
    checks.timed_exchange(taken, given, num_sms)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"us": -1.0}, "timed_exchange: us: expected 0 or more, below 1,000,000, got -1.0"),
        ({"us": float("nan")}, "us: expected 0 or more"),
        ({"x": torch.zeros(0, 8)}, r"timed_exchange: x: expected some values, got shape \(0, 8\)"),
        (
            {"x": torch.zeros(2, 8, dtype=torch.float16)},
            "timed_exchange: out: expected torch.float16, got torch.float32",
        ),
        ({"x": torch.zeros(8, 2).T}, "timed_exchange: x: expected a matrix of contiguous rows"),
        ({"num_sms": 0}, "num_sms: expected a positive number, got 0"),
    ],
)
def test_a_timed_exchange_names_what_is_wrong(change: dict[str, object], message: str) -> None:
    operands = {"x": torch.zeros(2, 8), "out": torch.zeros(2, 8), "scale": 1.0, "us": 1.0} | change
    with pytest.raises(ValueError, match=message):
        kernels.timed_exchange(operands.pop("x"), **operands)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("bias", [False, True])
def test_linear(checks: Checks, tokens: int, bias: bool) -> None:
    checks.linear(tokens, bias, wide_output=False)
    checks.linear(tokens, bias, wide_output=False, num_sms=2, inner=72, width=136)


@pytest.mark.parametrize("tokens", [*TOKENS, 149])
@pytest.mark.parametrize("num_sms", [None, 1, 99])
def test_linear_swiglu(checks: Checks, tokens: int, num_sms: int | None) -> None:
    checks.linear_swiglu(tokens, 72, 136, num_sms)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("padding", [0, 3])
def test_rope_append(checks: Checks, mix: str, padding: int) -> None:
    """Rows are independent of each other: of a prompt, more than there are programs, in more than one page."""
    requests = [(0, 53)] if mix == "a whole prompt" else MIXES[mix]
    checks.rope_append(requests, 5, 1, 64, 7, padding)


@pytest.mark.parametrize("mix", ["few rows", "nothing"])
def test_norm_rope_append(checks: Checks, mix: str) -> None:
    checks.rope_append(MIXES[mix], 5, 1, 64, 7, 3, normed=True, attention_factor=1.3)


@pytest.mark.parametrize(("pairs", "normed"), [(24, False), (5, True)])
def test_rope_append_to_a_part_of_each_head(checks: Checks, pairs: int, normed: bool) -> None:
    checks.rope_append(MIXES["few rows"], 5, 1, 64, 7, 3, normed=normed, attention_factor=1.3, pairs=pairs)


# groups of 1, 3, 4 and 8 query heads; pages gathered and in tiles
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_tokens", "padding", "num_sms"),
    [(4, 1, 64, 16, 0, None), (2, 2, 64, 64, 3, 1), (8, 1, 128, 64, 1, 99), (3, 1, 64, 7, 2, 2), (4, 1, 64, 128, 0, 1)],
)
def test_attention_over_poisoned_pages(
    mix: str, heads: int, kv_heads: int, head_dim: int, page_tokens: int, padding: int, num_sms: int | None
) -> None:
    dtype = torch.float16 if page_tokens == 64 else torch.float32
    Checks("cpu", dtype).attention(MIXES[mix], heads, kv_heads, head_dim, page_tokens, padding, num_sms)


@pytest.mark.parametrize("mix", ["decodes of very different lengths", "chunks and decodes", "few rows"])
@pytest.mark.parametrize(("window", "page_tokens"), [(1, 64), (33, 7), (70, 64)])
def test_attention_in_a_window(mix: str, window: int, page_tokens: int) -> None:
    dtype = torch.float16 if page_tokens == 64 else torch.float32
    Checks("cpu", dtype).attention(MIXES[mix], 4, 2, 16, page_tokens, 3, window=window)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("experts", "chosen"), [(8, 2), (7, 3), (1, 1), (128, 8)])
def test_route(tokens: int, experts: int, chosen: int) -> None:
    for renormalise in (True, False):
        Checks("cpu", torch.float32).route(tokens, experts, chosen, renormalise)


@pytest.mark.parametrize("tokens", [*TOKENS, 149])
def test_grouped_products(checks: Checks, tokens: int) -> None:
    checks.grouped(tokens, 5, 2, 71, 137)


@pytest.mark.parametrize("rows", [0, 1, 11])
def test_sample(rows: int) -> None:
    Checks("cpu", torch.float32).sample(rows, 97)


@pytest.mark.parametrize(("rows", "concerned"), [(1, 0), (1, 1), (11, 7)])
def test_edits_of_logits(rows: int, concerned: int) -> None:
    checks = Checks("cpu", torch.float32)
    checks.penalise(rows, concerned, 97)
    checks.mask(rows, concerned, 97)


def test_errors_name_the_operand() -> None:
    x = torch.ones(4, 6)
    with pytest.raises(ValueError, match=r"linear_swiglu: weight: expected shape \(12, 6\), got \(4, 6\)"):
        kernels.linear_swiglu(x, x, out=x)
    with pytest.raises(ValueError, match=r"linear_swiglu: x: expected rows at multiples of 16 bytes, got one every 24"):
        kernels.linear_swiglu(x, x, out=x[:, :2])
    with pytest.raises(ValueError, match=r"add_rms_norm: update: expected torch.float32, got torch.float16"):
        kernels.add_rms_norm(x, x.half(), x[0], eps=1e-5, out=(x, x))
    with pytest.raises(ValueError, match=r"add_rms_norm: update: expected a matrix of contiguous rows"):
        kernels.add_rms_norm(x, x.T.contiguous().T, x[0], eps=1e-5, out=(x, x))
    with pytest.raises(ValueError, match="num_sms: expected a positive number, got 0"):
        kernels.embed(torch.zeros(4, dtype=torch.int32), x, out=(x, x), num_sms=0)


def test_the_engine_can_say_what_runs_every_operation() -> None:
    for architecture in WITH_NORMS:
        model = build(config(architecture))
        operations = [op for graph in (model.embed, model.layer, model.head) for op in graph.operations]
        lines = kernels.describe_implementations((op.kernel, op.name) for op in operations)
        for operation in operations:
            if operation.resource is not Resource.NETWORK:
                assert any(x.startswith(f"{operation.kernel} (") and operation.name in x for x in lines), operation
