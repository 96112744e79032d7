"""Schedules: fitting, validation rule by rule, the built-in plans, and the waits they get."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from support.models.shapes import CONFIGS, config
from support.schedule.schedules import in_lanes, random_schedule, rotated, without_wait

from nanoflow_backend.graph.collectives import AllReduceForm, in_forms
from nanoflow_backend.graph.nano_batch import dependencies
from nanoflow_backend.graph.operation import Graph
from nanoflow_backend.models.model import build
from nanoflow_backend.schedule.order import PartialOrder
from nanoflow_backend.schedule.plan import Group, Launch, Schedule, ScheduleError, Wait
from nanoflow_backend.schedule.presets import nano_batched, overlapped, sequential, synchronise
from nanoflow_backend.schedule.validate import validate

LAYER = build(config("llama")).layer
LEADING = ("attention_norm", "qkv")


def change(schedule: Schedule, name: str, part: int = 0, **fields: object) -> Schedule:
    """`schedule` with one launch of the operation `name` changed."""
    at = [i for i, x in enumerate(schedule.launches) if x.operation == name][part]
    launches = list(schedule.launches)
    launches[at] = replace(launches[at], **fields)
    return replace(schedule, launches=tuple(launches))


def minimal(schedule: Schedule, graph: Graph, num_layers: int) -> int:
    """Check that each wait is needed; return how many there are."""
    count = 0
    for number, launch in enumerate(schedule.launches):
        for wait in launch.waits:
            count += 1
            with pytest.raises(ScheduleError, match="may start before"):
                validate(without_wait(schedule, number, wait), graph, num_layers)
    return count


# fit


@given(
    st.integers(1, 40).flatmap(lambda grains: st.tuples(st.just(grains), st.sets(st.integers(0, grains), max_size=8))),
    st.sampled_from([1, 3, 16]),
    st.data(),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_fit_scales_boundaries_monotonically(cut: tuple[int, set[int]], granularity: int, data: st.DataObject) -> None:
    grains, chosen = cut
    tokens = grains * granularity - data.draw(st.integers(0, granularity - 1))
    boundaries = sorted({min(b * granularity, tokens) for b in chosen} | {0, tokens})
    ranges = [(a, b) for a in boundaries for b in boundaries if a < b]
    launches = tuple(Launch(operation="x", start=a, stop=b, lane="x") for a, b in ranges)
    schedule = Schedule(tokens=tokens, launches=launches, granularity=granularity)
    fewer = data.draw(st.integers(0, tokens))
    fitted = dict(zip(ranges, schedule.fit(fewer), strict=True))
    image: dict[int, int] = {}
    for (a, b), (start, stop) in fitted.items():
        assert 0 <= start <= stop <= fewer
        assert image.setdefault(a, start) == start  # a boundary goes to one place, wherever it stands
        assert image.setdefault(b, stop) == stop
        assert all(x % granularity == 0 or x == fewer for x in (start, stop))
    assert image[0] == 0
    assert image[tokens] == fewer
    assert [image[b] for b in boundaries] == sorted(image.values())


def test_fit_of_a_full_batch_changes_nothing() -> None:
    schedule = nano_batched(LAYER, 1000, 3, granularity=128)
    assert schedule.fit(1000) == [(x.start, x.stop) for x in schedule.launches]
    assert {x.start for x in schedule.launches} == {0, 256, 640}


def test_small_batches_still_have_two_nano_batches() -> None:
    schedule = nano_batched(LAYER, 512, 3)
    for tokens in range(2, 513):
        parts = {part for part in schedule.fit(tokens) if part[0] < part[1]}
        assert len(parts) == min(tokens, 3), tokens


def test_groups_fit_as_launches_do() -> None:
    schedule = overlapped(LAYER, 1000, 384, 0.7, 32, 132, granularity=128)
    for tokens in (1, 63, 64, 200, 999, 1000):
        first, last = schedule.fit_groups(tokens)
        assert {(0, first.stop), (first.stop, tokens)} == set(schedule.fit(tokens))
        assert (last.stop, first.decodes, last.decodes) == (tokens, 0.7, pytest.approx(0.3))
    assert sequential(LAYER, 8).fit_groups(5) == ()


# validate: each rule


def broken(rule: str) -> Schedule:
    whole, plan = sequential(LAYER, 8), nano_batched(LAYER, 8, 2)
    first = plan.launches[0]
    return {
        "unknown operation": lambda: change(plan, "qkv", operation="kqv"),
        "empty": lambda: change(plan, "qkv", start=4, stop=4),
        "outside": lambda: change(plan, "qkv", part=1, stop=9),
        "granularity": lambda: replace(plan, granularity=3),
        "behind": lambda: change(plan, "qkv", layers_ahead=-1),
        "no such launch": lambda: change(plan, "qkv", waits=(Wait(99),)),
        "a later layer": lambda: change(plan, "qkv", waits=(Wait(0, layers_back=-1),)),
        "hole": lambda: change(plan, "o", part=1, start=5),
        "twice": lambda: change(plan, "o", part=1, start=3),
        "cut short": lambda: change(plan, "o", part=1, stop=7),
        "missing": lambda: replace(whole, launches=tuple(x for x in whole.launches if x.operation != "o")),
        "deadlock": lambda: change(plan, "attention_norm", waits=(Wait(5),)),
        "rows": lambda: change(plan, "qkv", waits=()),
        "layer before": lambda: change(plan, "attention_norm", waits=()),
        "pages": lambda: change(in_lanes(plan, LAYER, {"rope_append": "append"}), "attention", part=1, waits=()),
        "order": lambda: replace(whole, launches=whole.launches[::-1]),
        "stray lane": lambda: replace(plan, partition={"compute": 8, "memory": 8, "network": 4, "x": 1}),
        "negative SMs": lambda: replace(plan, partition={"compute": 18, "memory": -6, "network": 4}),
        "no SMs": lambda: replace(plan, partition={"compute": 8, "memory": 8}),
        "too many SMs": lambda: replace(plan, partition={"compute": 8, "memory": 8, "network": 4}),
        "share of the lane": lambda: change(
            replace(plan, partition={"compute": 8, "memory": 4, "network": 4}), first.operation, sms=5
        ),
        "share of the device": lambda: change(plan, first.operation, sms=17),
        "no share": lambda: change(plan, first.operation, sms=0),
        "groups out of order": lambda: replace(plan, groups=(Group(6, 0.5), Group(4, 0.0), Group(8, 0.5))),
        "an empty group": lambda: replace(plan, groups=(Group(0, 0.5), Group(8, 0.5))),
        "rows in no group": lambda: replace(plan, groups=(Group(4, 0.5), Group(7, 0.5))),
        "a group off the grains": lambda: replace(whole, granularity=4, groups=(Group(3, 0.5), Group(8, 0.5))),
        "decodes in no group": lambda: replace(plan, groups=(Group(4, 0.5), Group(8, 0.4))),
        "a negative share": lambda: replace(plan, groups=(Group(4, 1.5), Group(8, -0.5))),
        "no number": lambda: replace(plan, groups=(Group(4, float("nan")), Group(8, 0.5))),
    }[rule]()


RULES = {
    "unknown operation": r"launch 2 \(kqv 0\.\.4\): the model has no such operation; it has \['attention_norm', 'qkv'",
    "empty": r"launch 2 \(qkv 4\.\.4\): expected a non-empty range inside 0\.\.8",
    "outside": r"launch 3 \(qkv 4\.\.9\): expected a non-empty range inside 0\.\.8",
    "granularity": r"launch 0 \(attention_norm 0\.\.4\): 4 is not a multiple of the granularity 3",
    "behind": r"launch 2 \(qkv 0\.\.4\): layers_ahead is -1, expected 0..3 \(layers\)",
    "no such launch": r"launch 2 \(qkv 0\.\.4\): there is no launch 99, 0 layers back, to wait for",
    "a later layer": r"launch 2 \(qkv 0\.\.4\): there is no launch 0, -1 layers back, to wait for",
    "hole": r"o: tokens 4\.\.5 are never computed",
    "twice": r"o: tokens 3\.\.4 are covered twice",
    "cut short": r"o: tokens 7\.\.8 are never computed",
    "missing": r"o: tokens 0\.\.8 are never computed",
    "deadlock": r"launch 0 \(attention_norm 0\.\.4\): waits for launch 5, which is not issued before it",
    "rows": r"launch 2 \(qkv 0\.\.4\) in layer 0 may start before launch 0 \(attention_norm 0\.\.4\) of layer 0",
    "layer before": r"launch 0 \(attention_norm 0\.\.4\) in layer 1 may start before launch 18 "
    r"\(mlp_reduce 0\.\.4\) of layer 0 has ended: it reads what that one writes",
    "pages": r"launch 7 \(attention 4\.\.8\) in layer 0 may start before launch . \(rope_append ....\) of layer 0 has",
    "order": r"launch 0 \(mlp_reduce 0\.\.8\) in layer 0 may start before launch 1 \(down 0\.\.8\) of layer 0",
    "stray lane": r"partition: no launch is in lane \['x'\]",
    "negative SMs": "partition: lane 'memory' owns -6 SMs, expected at least 1",
    "no SMs": r"partition: lane \['network'\] has no SMs of its own",
    "too many SMs": "partition: its lanes own 20 SMs, the device has 16",
    "share of the lane": r"launch 0 \(attention_norm 0\.\.4\): sms is 5, expected 1\.\.4",
    "share of the device": r"launch 0 \(attention_norm 0\.\.4\): sms is 17, expected 1\.\.16",
    "groups out of order": r"groups: expected ascending stops from 1 to 8, got \[6, 4, 8\]",
    "an empty group": r"groups: expected ascending stops from 1 to 8, got \[0, 8\]",
    "rows in no group": r"groups: expected ascending stops from 1 to 8, got \[4, 7\]",
    "a group off the grains": "groups: stop 3 is not a multiple of the granularity 4",
    "decodes in no group": r"groups: expected shares of the decodes, 0 or more and 1 together, got \[0\.5, 0\.4\]",
    "a negative share": r"groups: expected shares .* got \[1\.5, -0\.5\]",
    "no number": r"groups: expected shares .* got \[nan, 0\.5\]",
    "no share": r"launch 0 \(attention_norm 0\.\.4\): sms is 0, expected 1\.\.16",
}


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_names_the_launch_that_breaks_it(rule: str) -> None:
    with pytest.raises(ScheduleError, match=RULES[rule]):
        validate(broken(rule), LAYER, 3, device_sms=16)


def test_shares_may_overlap_without_a_partition() -> None:
    plan = change(change(nano_batched(LAYER, 8, 2), "qkv", sms=16), "attention", sms=16)
    validate(plan, LAYER, 3, device_sms=16)


def test_attention_waits_for_appends_of_all_earlier_tokens() -> None:
    """Launched back to front, the second nano-batch's attention still waits for the first one's append."""
    plan = nano_batched(LAYER, 8, 2)
    order = [i for op in range(len(LAYER.operations)) for i in (2 * op + 1, 2 * op)]
    backwards = replace(plan, launches=tuple(replace(plan.launches[i], waits=()) for i in order))
    synchronised = synchronise(in_lanes(backwards, LAYER, {"rope_append": "append"}), LAYER)
    validate(synchronised, LAYER, 3)
    at = {(x.operation, x.start): i for i, x in enumerate(synchronised.launches)}
    assert synchronised.launches[at["attention", 4]].waits == (Wait(at["rope_append", 0]),)


def test_a_plan_needs_tokens_and_grains() -> None:
    with pytest.raises(ScheduleError, match="tokens: expected an integer >= 1, got 0"):
        Schedule(tokens=0, launches=())
    with pytest.raises(ScheduleError, match="granularity: expected an integer >= 1, got 0"):
        Schedule(tokens=1, granularity=0, launches=())


# presets


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tp", [1, 2, 8])
@pytest.mark.parametrize("split", [(), ("attention_reduce", "mlp_reduce")])
def test_presets_are_valid_for_every_model(name: str, tp: int, split: tuple[str, ...]) -> None:
    layer = in_forms(build(config(name), tp).layer, dict.fromkeys(split, AllReduceForm.SPLIT), tp)
    for num_layers in (1, 2, 5):
        validate(sequential(layer, 512), layer, num_layers)
        for parts, granularity in [(1, 1), (2, 1), (3, 1), (4, 128), (3, 7), (2, 500)]:
            validate(nano_batched(layer, 512, parts, granularity), layer, num_layers)
        for stop, granularity in [(256, 1), (128, 128), (1, 1), (511, 1)]:
            plan = overlapped(layer, 512, stop, 0.9, 40, 132, granularity)
            validate(plan, layer, num_layers, device_sms=132)


@pytest.mark.parametrize("name", CONFIGS)
def test_next_layer_may_start_before_this_one_ends(name: str) -> None:
    layer = build(config(name)).layer
    for parts in (2, 3):
        plan = rotated(layer, nano_batched(layer, 12, parts), LEADING, 12 // parts)
        assert [x.layers_ahead for x in plan.launches].count(1) == 2
        # The first nano-batch of the next layer is issued before the last one of this layer ends.
        assert plan.launches[-1].layers_ahead == 0
        for num_layers in (1, 2, 5):
            validate(plan, layer, num_layers)


@pytest.mark.parametrize("name", CONFIGS)
def test_attention_of_one_half_runs_beside_the_other_half(name: str) -> None:
    """Between an attention and the first launch that waits for it, the compute lane has a whole layer of the others."""
    layer, num_layers = build(config(name)).layer, 4
    plan = overlapped(layer, 512, 256, 0.5, 40, 132)
    order = PartialOrder(plan, num_layers)
    names = [op.name for op in layer.operations if op.name != "attention"]
    at = {(x.operation, x.start): number for number, x in enumerate(plan.launches)}
    for number, mine, other in [(1, 0, 256), (2, 256, 0)]:
        attention, o = (order.index[number, at[op, mine]] for op in ("attention", "o"))
        assert order.precedes(attention, o)
        beside = [k for k in range(len(order.steps)) if not order.precedes(k, attention) and order.precedes(k, o)]
        launches = [plan.launches[order.steps[k][1]] for k in beside if k != attention]
        assert sorted(x.operation for x in launches) == sorted(names)
        assert {(x.lane, x.start) for x in launches} == {("compute", other)}


def test_sequential_needs_no_waits() -> None:
    assert not any(x.waits for x in sequential(LAYER, 8).launches)


def test_more_parts_than_grains_are_refused() -> None:
    with pytest.raises(ValueError, match=r"parts: expected 1\.\.4 nano-batches of 512 tokens, got 5"):
        nano_batched(LAYER, 512, 5, granularity=128)


def test_waits_are_sufficient_and_minimal() -> None:
    waits = 0
    for name in CONFIGS:
        layer = build(config(name)).layer
        for parts in (2, 3):
            plan = nano_batched(layer, 12, parts)
            lanes = [{}, {"rope_append": "append"}, {"attention": "compute"}, {"mlp_norm": "network"}]
            plans = [in_lanes(plan, layer, moved) for moved in lanes]
            plans.append(rotated(layer, plan, LEADING, 12 // parts))
            plans.append(overlapped(layer, 12, 12 // parts, 0.5, 1, 2))
            for schedule in plans:
                validate(schedule, layer, 5)
                waits += minimal(schedule, layer, 5)
    assert waits > 500


def test_random_schedules_get_sufficient_and_minimal_waits() -> None:
    """Operations cut at different places, in random lanes and orders, some of it a layer ahead."""
    waits = ahead = 0
    for seed in range(60):
        schedule = random_schedule(LAYER, 8, random.Random(seed))
        validate(schedule, LAYER, 6)
        waits += minimal(schedule, LAYER, 6)
        ahead += any(x.layers_ahead for x in schedule.launches)
    assert waits > 500
    assert ahead > 10


def test_issue_order_must_follow_values() -> None:
    plan = sequential(LAYER, 8)
    with pytest.raises(
        ScheduleError, match=r"launch 0 \(mlp_reduce 0\.\.8\) is issued before what it reads is written"
    ):
        synchronise(replace(plan, launches=plan.launches[::-1]), LAYER)
    assert len(dependencies(LAYER, [x.nano for x in plan.launches])) == len(LAYER.operations)
