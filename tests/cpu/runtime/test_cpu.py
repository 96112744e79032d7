"""CpuProgram against transformers, in the order of issue and in other interleavings; and what it refuses."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from nanoflow_kernels import reference
from support.comparison import assert_close, relative_rms
from support.models.batches import forward
from support.models.cases import BATCHES, LENGTHS, TOKENS, Case
from support.schedule.schedules import interleavings, plans, random_interleaving, random_schedule
from torch import Tensor

from benchmarks.models import checkpoints
from nanoflow_backend.config.precision import BFLOAT16
from nanoflow_backend.kvcache.kv_pages import KvPages
from nanoflow_backend.runtime.binding import Binding, FittedPlan
from nanoflow_backend.runtime.collectives.one_rank import OneRank
from nanoflow_backend.runtime.cpu import CpuProgram
from nanoflow_backend.runtime.tags import StaleRead
from nanoflow_backend.schedule.order import PartialOrder
from nanoflow_backend.schedule.presets import nano_batched, overlapped, sequential
from nanoflow_backend.schedule.validate import validate


@pytest.fixture(scope="module", params=checkpoints.OWN_GRAPHS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp(request.param), request.param, LENGTHS, num_hidden_layers=3)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """One layer, small enough to run thousands of times."""
    shape = {"heads": 2, "kv_heads": 1, "head_dim": 4, "hidden_size": 8, "intermediate_size": 5, "vocab_size": 37}
    return Case(tmp_path_factory.mktemp("llama"), "llama", LENGTHS, num_hidden_layers=1, **shape)


def kernels(**replaced: Any) -> SimpleNamespace:
    return SimpleNamespace(**vars(reference) | replaced)


def test_logits_are_those_of_transformers(case: Case) -> None:
    for name, schedule in plans(case.model.layer, TOKENS).items():
        validate(schedule, case.model.layer, 3)
        case.check(case.program(schedule, checked=name != "three"))


def test_random_interleavings_give_the_same_logits(case: Case) -> None:
    graph, rng = case.model.layer, random.Random(1)
    ahead = 0
    for schedule in [*plans(graph, TOKENS).values(), *(random_schedule(graph, TOKENS, rng) for _ in range(12))]:
        ahead += any(launch.layers_ahead for launch in schedule.launches)
        order, program = PartialOrder(schedule, 3), case.program(schedule)
        for _ in range(2):
            case.check(program, lambda order=order: random_interleaving(order, rng))
    assert ahead >= 4


def test_every_interleaving_gives_the_same_logits(llama: Case) -> None:
    """One layer in two nano-batches whose boundary cuts a request's chunk, in two assignments of lanes."""
    batch = [(0, 0, 5), (1, 0, 3)]
    inputs, expected = llama.requests.inputs(batch), llama.requests.rows(llama.logits, batch)
    ran = []
    for name in ("two", "attend beside compute"):
        schedule = plans(llama.model.layer, 8)[name]
        program = llama.program(schedule, checked=False)
        ran.append(0)
        for order in interleavings(PartialOrder(schedule, 1)):
            for pages in program.binding.kv.tensor:
                pages.fill_(torch.nan)
            forward(program, inputs, order=order)
            assert_close(f"logits in the order {order}", program.head(torch.arange(8)), expected)
            ran[-1] += 1
    assert ran == [272, 208]


def test_bfloat16_follows_float32(case: Case) -> None:
    pages = KvPages.allocate(case.config, case.requests.num_pages, 4, torch.bfloat16, poison=True)
    weights = {
        name: w if name.endswith("frequencies") else w.bfloat16() for name, w in case.weights.items()
    }  # fmt: skip
    schedule = nano_batched(case.model.layer, TOKENS, 3)
    options: dict[str, Any] = {"max_tokens": TOKENS, "precision": BFLOAT16}
    binding = Binding(case.model, [schedule], weights, pages, OneRank(), reference, **options)
    program = CpuProgram(binding, checked=True)
    forward(program, case.requests.inputs(BATCHES[0]))
    logits = program.head(torch.arange(TOKENS))
    assert logits.dtype == torch.float32
    # The median row: in a router's near tie, rounding may choose other experts.
    errors = [relative_rms(a, b) for a, b in zip(logits, case.requests.rows(case.logits, BATCHES[0]), strict=True)]
    assert 1e-4 < sorted(errors)[len(errors) // 2] < 0.05


def test_each_batch_runs_under_the_plan_for_its_size(case: Case) -> None:
    """Batches of 1, 8 and 16 tokens in turn, each under a plan of its own, on buffers that the plans share."""
    graph, rng = case.model.layer, random.Random(3)
    for _ in range(4):
        sizes = (rng.randint(1, 2), rng.randint(8, 14), TOKENS)
        schedules = [sequential(graph, sizes[0]), *(random_schedule(graph, size, rng) for size in sizes[1:])]
        program = case.program(*schedules)
        for tokens in range(1, TOKENS + 1):
            expected = next(schedule for schedule in schedules if schedule.tokens >= tokens)
            assert program.plan_for(tokens, 0).bound.schedule is expected
        case.check(program, batches=BATCHES)


def test_plans_of_one_size_change_from_step_to_step(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random plans for batches whose decodes read much, sequential for the others."""
    graph, rng, ran = case.model.layer, random.Random(5), []
    forward = CpuProgram.forward

    def recorded(program: CpuProgram, plan: FittedPlan, *inputs: Tensor, **options: Any) -> None:
        ran.append(plan.bound.schedule)
        forward(program, plan, *inputs, **options)

    monkeypatch.setattr(CpuProgram, "forward", recorded)
    whole, halves = sequential(graph, TOKENS), overlapped(graph, TOKENS, 8, 0.5, 1, 2)
    for plan in (halves, *(random_schedule(graph, TOKENS, rng) for _ in range(4))):
        cut = replace(plan, least_decode_kv_tokens=18)
        case.check(case.program(cut, whole), batches=BATCHES)
        assert ran == [whole, cut, whole, cut]
        ran.clear()


# the seams of a batch


def test_more_batch_sizes_than_are_kept_bound(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanoflow_backend.runtime.cpu.CACHED_BATCH_SIZES", 2)
    llama.check(llama.program(nano_batched(llama.model.layer, TOKENS, 2)), batches=BATCHES)


def test_another_page_table_is_used_at_once(llama: Case) -> None:
    program = llama.program(sequential(llama.model.layer, TOKENS))
    llama.check(program)
    inputs = llama.requests.inputs(BATCHES[0])
    forward(program, (*inputs[:3], inputs.page_table.flip(0).contiguous()))
    assert_close("logits", program.head(torch.arange(16)), llama.requests.rows(llama.logits, BATCHES[0]))


def test_head_reads_the_rows_asked_for(llama: Case) -> None:
    program = llama.program(sequential(llama.model.layer, TOKENS))
    forward(program, llama.requests.inputs(BATCHES[0]))
    rows = torch.tensor([15, 6])
    assert_close("logits", program.head(rows), llama.requests.rows(llama.logits, BATCHES[0])[rows])
    assert program.head(torch.tensor([], dtype=torch.int64)).shape == (0, 37)


def test_what_a_batch_does_not_have_is_refused(llama: Case) -> None:
    program = llama.program(sequential(llama.model.layer, 32), max_tokens=TOKENS)
    with pytest.raises(ValueError, match="max_tokens: expected at most the schedule's 32, got 33"):
        llama.program(sequential(llama.model.layer, 32), max_tokens=33)
    with pytest.raises(
        StaleRead, match=r"the head reads 'mlp_norm\.residual' of layer 0, but its rows 0\.\.32 hold nothing"
    ):
        program.head(torch.tensor([], dtype=torch.int64))
    with pytest.raises(ValueError, match="tokens: expected at most 16, got 17"):
        forward(program, llama.requests.inputs([(2, 0, 17)]))
    with pytest.raises(ValueError, match="token_ids: expected the plan's 5 tokens, got 4"):
        program.forward(program.plan_for(5, 0), *llama.requests.inputs([(2, 0, 4)]))
    forward(program, llama.requests.inputs([(2, 0, 4)]))
    with pytest.raises(IndexError, match=r"rows: expected 0\.\.3, got \[0, 4\]"):
        program.head(torch.tensor([0, 4]))


# kernels that do not keep to their rows


def test_a_kernel_that_reads_the_row_after_its_own_is_caught(llama: Case) -> None:
    def linear(x: Tensor, weight: Tensor, *, out: Tensor) -> None:
        one_more = x.as_strided((len(x) + 1, x.shape[1]), x.stride())
        reference.linear(one_more[1:], weight, out=out)

    schedule = nano_batched(llama.model.layer, TOKENS, 2)
    program = llama.program(schedule, kernels=kernels(linear=linear))
    with pytest.raises(StaleRead, match=r"launch 2 \(qkv 0\.\.8\) in layer 0 leaves poison in its output"):
        forward(program, llama.requests.inputs([(2, 0, 15)]), order=first(PartialOrder(schedule, 1), 2))


def first(order: PartialOrder, step: int) -> list[int]:
    """The interleaving in which nothing runs before `step` that need not."""
    needed = [k for k in range(len(order.steps)) if order.precedes(k, step)] + [step]
    return needed + [k for k in range(len(order.steps)) if k not in needed]


def test_a_kernel_that_leaves_a_row_is_caught(llama: Case) -> None:
    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor) -> None:
        reference.linear(x[:-1], weight, bias, out=out[:-1])

    program = llama.program(sequential(llama.model.layer, TOKENS), kernels=kernels(linear=linear))
    with pytest.raises(StaleRead, match=r"launch 1 \(qkv 0\.\.16\) in layer 0 leaves poison in its output"):
        forward(program, llama.requests.inputs(BATCHES[0]))


def test_a_router_that_leaves_a_row_is_caught(tmp_path: Path) -> None:
    def route(logits: Tensor, *, out: tuple[Tensor, Tensor]) -> None:
        chosen, scores = torch.empty_like(out[0]), out[1]
        reference.route(logits, out=(chosen, scores))
        out[0][1:] = chosen[1:]

    mixtral = Case(tmp_path, "mixtral", LENGTHS, num_hidden_layers=1)
    program = mixtral.program(sequential(mixtral.model.layer, TOKENS), kernels=kernels(route=route))
    with pytest.raises(StaleRead, match=r"launch 8 \(route 0\.\.16\) in layer 0 leaves poison in its output"):
        forward(program, mixtral.requests.inputs(BATCHES[0]))


def test_a_missed_append_is_caught(llama: Case) -> None:
    """A decode whose prompt never came: its pages are NaN."""
    program = llama.program(sequential(llama.model.layer, TOKENS))
    with pytest.raises(StaleRead, match=r"launch 3 \(attention 0\.\.16\) in layer 0 leaves poison in its output"):
        forward(program, llama.requests.inputs([(0, 8, 9)]))
