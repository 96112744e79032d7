"""Binding: collectives of one rank that are not run, and batches that are padded to a bucket."""

import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from nanoflow_kernels import reference
from support.collectives.in_process import Group, InProcess
from support.comparison import assert_close
from support.models.cases import BATCHES, LENGTHS, TOKENS, Case
from support.schedule.schedules import in_lanes, plans, random_interleaving, random_schedule

from nanoflow_backend.config.precision import FLOAT32
from nanoflow_backend.graph.collectives import AllReduceForm, in_forms
from nanoflow_backend.runtime.binding import Binding
from nanoflow_backend.runtime.collectives.one_rank import OneRank
from nanoflow_backend.runtime.cuda import CudaProgram, bucket
from nanoflow_backend.schedule.order import PartialOrder
from nanoflow_backend.schedule.plan import Schedule
from nanoflow_backend.schedule.presets import nano_batched, sequential


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("llama"), "llama", LENGTHS, num_hidden_layers=3)


def test_without_the_copies_of_one_rank_every_interleaving_tried_gives_the_same_logits(case: Case) -> None:
    graph, rng = case.model.layer, random.Random(2)
    reduces = dict.fromkeys(("attention_reduce", "mlp_reduce"), AllReduceForm.SPLIT)
    split = replace(nano_batched(in_forms(graph, reduces, 1), TOKENS, 2), all_reduces=reduces)
    schedules = [split, *plans(graph, TOKENS).values(), *(random_schedule(graph, TOKENS, rng) for _ in range(12))]
    for schedule in schedules:
        binding = bound(case, schedule)
        networks = [call is None for call in binding.layers(binding.plan_for(TOKENS, 0))]
        steps = binding.plans[0].steps
        assert sum(networks) == sum("reduce" in schedule.launches[n].operation for _, n in steps) > 0
        for order in (range(len(steps)), random_interleaving(PartialOrder(schedule, 3), rng)):
            check(case, binding, order)


def bound(case: Case, *schedules: Schedule) -> Binding:
    pages, options = case.requests.empty_pages(), {"max_tokens": schedules[-1].tokens, "precision": FLOAT32}
    binding = Binding(case.model, schedules, case.weights, pages, OneRank(), reference, in_place=True, **options)
    binding.page_table = case.requests.page_table
    return binding


def check(case: Case, binding: Binding, order) -> None:
    for batch in BATCHES:
        token_ids, positions, slots, _ = case.requests.inputs(batch)
        tokens = len(token_ids)
        plan = binding.plan_for(tokens, 0)
        for buffer in binding.buffers:
            buffer.fill_(torch.nan)
        binding.positions[:tokens], binding.slots[:tokens] = positions, slots
        calls = binding.layers(plan)
        for call in binding.embed(plan, token_ids) + [calls[step] for step in order]:
            if call:
                call.run()
        values = dict(zip(case.model.head.inputs, binding.results(plan), strict=True))
        for call in binding.head(values):
            call.run()
        logits = values[case.model.head.outputs[0]]
        assert_close(f"logits of {batch}", logits, case.requests.rows(case.logits, batch))


def test_collectives_of_several_lanes_take_turns(case: Case) -> None:
    """Each after the one before it in the order of issue, which is the same on every rank; one rank has none."""
    graph = case.model.layer
    schedule = in_lanes(nano_batched(graph, TOKENS, 2), graph, {"mlp_reduce": "second network"})
    shared = Binding(
        case.model,
        [schedule],
        case.weights,
        case.requests.empty_pages(),
        InProcess(Group(2), 0),
        reference,
        max_tokens=TOKENS,
        precision=FLOAT32,
    )
    (plan,) = shared.plans
    asked, waits, alone = schedule.awaited(3), shared.waits(plan), bound(case, schedule)
    assert alone.waits(alone.plans[0]) == asked
    launches = [schedule.launches[number] for _, number in plan.steps]
    exchanges = [step for step, launch in enumerate(launches) if launch.operation.endswith("_reduce")]
    added = {step: set(waits[step]) - set(asked[step]) for step in range(len(launches))}
    assert all(step in exchanges for step, more in added.items() if more)
    crossings = 0
    for before, step in pairwise(exchanges):
        assert launches[before].lane == launches[step].lane or before in waits[step]
        crossings += launches[before].lane != launches[step].lane
        assert added[step] <= {before}
    assert crossings == 5, "from attention's to the MLP's in each layer, and on to the next"
    assert any(added.values())


def test_an_sm_cap_reaches_the_kernel_of_its_launch_alone(tmp_path: Path) -> None:
    case = Case(tmp_path, "llama", LENGTHS, num_hidden_layers=1)
    schedule = plans(case.model.layer, TOKENS)["sequential"]
    capped = tuple(replace(x, sms=5) if x.operation == "mlp_norm" else x for x in schedule.launches)
    for limit_sms, expected in ((True, {"mlp_norm": 5}), (False, {})):
        binding = Binding(
            case.model,
            [replace(schedule, launches=capped)],
            case.weights,
            case.requests.empty_pages(),
            OneRank(),
            reference,
            max_tokens=TOKENS,
            precision=FLOAT32,
            limit_sms=limit_sms,
        )
        binding.page_table = case.requests.page_table
        calls = zip(schedule.launches, binding.layers(binding.plan_for(TOKENS, 0)), strict=True)
        caps = {launch.operation: call.run.keywords.get("num_sms") for launch, call in calls if call}
        assert {name: cap for name, cap in caps.items() if cap} == expected


@pytest.mark.parametrize("form", ["sequential", "split"])
def test_an_sm_cap_reaches_collectives_too(case: Case, form: str) -> None:
    """With limit_sms, as on a GPU, where a lane with SMs of its own has the network's launches, too."""
    graph = case.model.layer
    reduces = dict.fromkeys(("attention_reduce", "mlp_reduce"), AllReduceForm.SPLIT)
    schedule = sequential(graph, TOKENS)
    if form == "split":
        schedule = replace(sequential(in_forms(graph, reduces, 1), TOKENS), all_reduces=reduces)
    capped = tuple(replace(x, sms=5) if "reduce" in x.operation else x for x in schedule.launches)
    schedule = replace(schedule, launches=capped)
    options = {"max_tokens": TOKENS, "precision": FLOAT32, "limit_sms": True}
    pages = case.requests.empty_pages()
    binding = Binding(case.model, [schedule], case.weights, pages, OneRank(), reference, **options)
    binding.page_table = case.requests.page_table
    for buffer in binding.buffers:
        buffer.fill_(1.0)
    ran = 0
    for (_, number), call in zip(binding.plans[0].steps, binding.layers(binding.plan_for(TOKENS, 0)), strict=True):
        if call and "reduce" in capped[number].operation:
            assert call.run.keywords["num_sms"] == 5
            call.run()
            ran += 1
    assert ran == 3 * (2 if form == "sequential" else 4)


def test_a_batch_runs_under_the_first_plan_that_holds_it(case: Case) -> None:
    """Random files: of the least size that has room, the plan that asks for most of what the batch's decodes read."""
    rng, chosen = random.Random(7), set()
    for _ in range(30):
        sizes = sorted(rng.sample(range(1, TOKENS + 1), rng.randint(1, 4)))
        asked = {size: sorted({0, *(rng.randint(1, 60) for _ in range(rng.randint(0, 3)))}) for size in sizes}
        schedules = [
            replace(sequential(case.model.layer, size), least_decode_kv_tokens=least)
            for size in sizes
            for least in reversed(asked[size])
        ]
        binding = bound(case, *schedules)
        for _ in range(40):
            tokens, read = rng.randint(1, sizes[-1]), rng.randint(0, 70)
            size = min(size for size in sizes if size >= tokens)
            least = max(least for least in asked[size] if least <= read)
            fitted = binding.plan_for(tokens, read)
            found = fitted.bound.schedule
            assert (found.tokens, found.least_decode_kv_tokens, fitted.tokens) == (size, least, tokens)
            chosen.add(asked[size].index(least))
    assert chosen == {0, 1, 2, 3}


def test_collectives_that_no_graph_can_hold_are_refused_before_the_device_is_touched(case: Case) -> None:
    pages, schedules = case.requests.empty_pages(), [sequential(case.model.layer, TOKENS)]
    collectives, options = InProcess(Group(2), 0), {"max_tokens": TOKENS, "precision": FLOAT32}
    binding = Binding(case.model, schedules, case.weights, pages, collectives, reference, **options)
    with pytest.raises(ValueError, match="cuda_graphs: expected collectives that a CUDA graph can hold, got InProcess"):
        CudaProgram(binding, max_rows=1)


def test_buckets_waste_at_most_an_eighth_and_are_few() -> None:
    for tokens in range(1, 5000):
        padded = bucket(tokens)
        assert bucket(padded) == padded >= tokens
        assert padded % 16 == 0 or padded in (1, 2, 4, 8)
        assert padded <= (1.125 * tokens if tokens > 128 else tokens + 15)
    assert len({bucket(tokens) for tokens in range(1, 2049)}) == 44
