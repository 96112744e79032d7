"""Stage two: optimal against exhaustion; shares, interference and power each do what they should."""

from dataclasses import replace

import pytest
from nanoflow_search.plan.bound import packing_bound_us
from nanoflow_search.plan.contention import Contention, ShareChoice, TaskShare
from nanoflow_search.plan.milp import Infeasible
from nanoflow_search.plan.problem import CyclicTimeline, NanoTask, PlacedTask, Problem, Task, TaskDependency
from nanoflow_search.plan.stage_one import stage_one
from nanoflow_search.plan.stage_two import stage_two

from benchmarks.paper import exhaustive_shares
from benchmarks.paper.random_problems import random_contention, random_problem

# Two tasks that need nothing of each other: 100 us each alone.
WHOLE = {(0, 1): 100.0}
PAIR = Problem(1, (Task("gemm", "compute", WHOLE), Task("read", "memory", WHOLE)), (TaskDependency("gemm", "gemm", 1),))
GEMM, READ = NanoTask("gemm", 0, 1), NanoTask("read", 0, 1)
ORDERED = CyclicTimeline(100.0, (PlacedTask(GEMM, 0.0, 100.0, 0), PlacedTask(READ, 0.0, 100.0, 0)))
SHARING = Contention(
    10,
    {GEMM: (ShareChoice(None, 100.0, 0.01),), READ: (ShareChoice(None, 100.0, 0.01),)},
    {(TaskShare("gemm", None), TaskShare("read", None)): 1.3, (TaskShare("read", None), TaskShare("gemm", None)): 1.5},
)


# The benchmark search_optimality does this for 240; these take exhaustion a second or less.
@pytest.mark.parametrize("seed", [1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 13, 15, 16, 18, 22])
def test_the_optimum_is_that_of_exhaustion(seed: int) -> None:
    problem, parts = random_problem(seed)
    ordered = stage_one(problem, parts if len(problem.tasks) < 4 else dict.fromkeys(parts, 1))
    contention = random_contention(seed, problem, ordered)
    exhausted_us = exhaustive_shares.shortest_period_us(problem, ordered, contention)
    assert stage_two(problem, ordered, contention).timeline.period_us == pytest.approx(exhausted_us, rel=1e-5)


def test_overlap_costs_both_sides() -> None:
    found = stage_two(PAIR, ORDERED, SHARING)
    assert found.timeline.period_us == pytest.approx(150)
    assert {p.nano: round(p.duration_us) for p in found.timeline.placed} == {GEMM: 130, READ: 150}
    assert found.sms == {GEMM: None, READ: None}


def test_what_slows_too_much_runs_apart() -> None:
    slow = replace(SHARING, slowdown=dict.fromkeys(SHARING.slowdown, 2.1))
    assert stage_two(PAIR, ORDERED, slow).timeline.period_us == pytest.approx(200)
    unmeasured = replace(SHARING, slowdown={})
    assert stage_two(PAIR, ORDERED, unmeasured).timeline.period_us == pytest.approx(200)


def test_partition_and_sharing_are_both_options() -> None:
    owned = {GEMM: ShareChoice(7, 120.0, 0.01), READ: ShareChoice(3, 125.0, 0.01)}
    both = {nano: (*SHARING.choices[nano], owned[nano]) for nano in owned}
    free = {(TaskShare("gemm", 7), TaskShare("read", 3)): 1.0, (TaskShare("read", 3), TaskShare("gemm", 7)): 1.0}
    found = stage_two(PAIR, ORDERED, replace(SHARING, choices=both, slowdown=SHARING.slowdown | free))
    assert found.timeline.period_us == pytest.approx(125)
    assert found.sms == {GEMM: 7, READ: 3}


def test_three_that_own_more_than_there_is_do_not_run_at_once() -> None:
    three = replace(PAIR, tasks=(*PAIR.tasks, Task("send", "network", WHOLE)))
    send = NanoTask("send", 0, 1)
    ordered = replace(ORDERED, placed=(*ORDERED.placed, PlacedTask(send, 0.0, 100.0, 0)))
    sides = [TaskShare(task, 4) for task in ("gemm", "read", "send")]
    free = {(a, b): 1.0 for a in sides for b in sides if a != b}
    choices = {nano: (ShareChoice(4, 100.0),) for nano in (GEMM, READ, send)}
    assert stage_two(three, ordered, Contention(12, choices, free)).timeline.period_us == pytest.approx(100)
    assert stage_two(three, ordered, Contention(11, choices, free)).timeline.period_us == pytest.approx(200)


def test_caps_beside_what_shares_all_sms_are_no_partition() -> None:
    """Two caps of 8 of 11 SMs: beside a launch on all of them they are as many programs, wherever they run."""
    three = replace(PAIR, tasks=(*PAIR.tasks, Task("send", "network", WHOLE)))
    send = NanoTask("send", 0, 1)
    ordered = replace(ORDERED, placed=(*ORDERED.placed, PlacedTask(send, 0.0, 100.0, 0)))
    caps = {GEMM: None, READ: 8, send: 8}
    sides = [TaskShare(nano.task, sms) for nano, sms in caps.items()]
    free = {(a, b): 1.0 for a in sides for b in sides if a != b}
    contention = Contention(11, {nano: (ShareChoice(sms, 100.0),) for nano, sms in caps.items()}, free)
    assert stage_two(three, ordered, contention).timeline.period_us == pytest.approx(100)
    assert packing_bound_us(three, contention) == pytest.approx(100)
    assert exhaustive_shares.shortest_period_us(three, ordered, contention) == pytest.approx(100)


def test_power_stretches_the_period_and_decides_between_shares() -> None:
    """0.02 J through 100 W beside the static power take 200 us; a frugal share that takes longer alone is better."""
    capped = replace(SHARING, power_cap_w=200.0, static_w=100.0)
    assert stage_two(PAIR, ORDERED, capped).timeline.period_us == pytest.approx(200)
    frugal = {nano: (*SHARING.choices[nano], ShareChoice(5, 110.0, 0.007)) for nano in SHARING.choices}
    free = {(TaskShare("gemm", 5), TaskShare("read", 5)): 1.0, (TaskShare("read", 5), TaskShare("gemm", 5)): 1.0}
    found = stage_two(PAIR, ORDERED, replace(capped, choices=frugal, slowdown=free))
    assert found.timeline.period_us == pytest.approx(140)
    assert found.dynamic_j == pytest.approx(0.014)


def test_what_cannot_be_is_named() -> None:
    capped = replace(SHARING, power_cap_w=200.0, static_w=100.0)
    with pytest.raises(Infeasible, match=r"infeasible: \(11\) power cannot hold with the constraints before it"):
        stage_two(PAIR, ORDERED, capped, period_limit_us=180)


# what no plan can beat


def test_the_bound_may_stop_and_resume() -> None:
    """130 us beside each other end the GEMM; the rest of the read has the device to itself."""
    assert packing_bound_us(PAIR, SHARING) == pytest.approx(130 + 100 * (1 - 130 / 150))


@pytest.mark.parametrize("seed", range(10))
def test_no_plan_beats_the_bound(seed: int) -> None:
    problem, parts = random_problem(seed)
    ordered = stage_one(problem, dict.fromkeys(parts, 1))
    contention = replace(random_contention(seed, problem, ordered), power_cap_w=float("inf"))
    assert packing_bound_us(problem, contention) <= stage_two(problem, ordered, contention).timeline.period_us + 1e-6
