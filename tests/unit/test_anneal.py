"""Annealed plans: against exhaustion on tiny layers; their periods against a simulation in small steps of time."""

import math
import random
from itertools import combinations, pairwise, permutations, product
from pathlib import Path

import a100
import pytest
from nanoflow_search.anneal import Fluid, Piece, Pieces, anneal, pieces_of
from nanoflow_search.cost_model import Workload
from nanoflow_search.layer import layer_problem, schedule_of
from nanoflow_search.planner import find_plans, one_after_the_other
from nanoflow_search.predict import predict
from nanoflow_search.problem import Dependency, NanoTask, Problem, Task

from nanoflow_backend.config import ModelConfig
from nanoflow_backend.models.model import build
from nanoflow_backend.schedule.validate import validate

MODELS = Path(__file__).parents[2] / "benchmarks" / "models"
LLAMA_70B = build(ModelConfig.from_pretrained(MODELS / "llama-2-70b"), 8)
TOKENS, CHUNK = 2048, 256
MEASURED = a100.Published(
    a100.profile(LLAMA_70B.layer, 8, a100.LLAMA_2_70B_TP8, a100.RELEASE), Workload(512, 512).mix(TOKENS)
)
PROBLEM = layer_problem(LLAMA_70B.layer, 8, TOKENS, CHUNK, MEASURED.times)
TENTHS = {share: round(share * a100.SMS) for share in a100.GEMM}
SMS = {task.name: (None,) if task.lane == "compute" else tuple(TENTHS.values()) for task in PROBLEM.tasks}


def random_pieces(rng: random.Random, problem: Problem = PROBLEM) -> Pieces:
    """Task after task, each cut at random; the last launches of a period are of a layer ahead."""
    found = []
    for task in problem.tasks:
        cuts = sorted(rng.sample(range(1, problem.chunks), rng.randint(1, 2)))
        for start, stop in pairwise((0, *cuts, problem.chunks)):
            found.append(Piece(NanoTask(task.name, start, stop), 0, rng.choice(SMS[task.name])))
    turned = rng.randrange(len(found))
    return (*found[turned:], *(piece._replace(layers_ahead=1) for piece in found[:turned]))


def period_in_steps_us(pieces: Pieces, layers: int = 6, step_us: float = 0.25) -> float:
    """By the paper's R alone: a GEMM keeps what the others' shares leave, they run at P(R)."""
    performance = {"memory": a100.RELEASE["attention"], "network": a100.RELEASE["network"]}
    share_of = {sms: share for share, sms in TENTHS.items()}
    launches = [
        (period + p.layers_ahead, p)
        for period in range(-1, layers)
        for p in pieces
        if 0 <= period + p.layers_ahead < layers
    ]
    left = {(layer, p.nano): PROBLEM[p.nano.task].duration_us[p.nano.start, p.nano.stop] for layer, p in launches}
    queues = {lane: [x for x in launches if PROBLEM[x[1].nano.task].lane == lane] for lane in PROBLEM.lanes}

    def may_start(layer: int, nano: NanoTask) -> bool:
        for d in PROBLEM.dependencies:
            if d.reader == nano.task:
                for (other_layer, other), work_us in left.items():
                    meets = other.start < nano.stop and (d.pages or nano.start < other.stop)
                    if other.task == d.writer and other_layer == layer - d.layers_back and meets and work_us > 0:
                        return False
        return True

    running: dict[str, tuple[int, Piece]] = {}
    now_us, ended_us = 0.0, {}
    while any(queues.values()) or running:
        for lane, queue in queues.items():
            if lane not in running and queue and may_start(queue[0][0], queue[0][1].nano):
                running[lane] = queue.pop(0)
        taken = {lane: share_of[p.sms] for lane, (_, p) in running.items() if p.sms}
        for lane, (layer, p) in list(running.items()):
            crowd = max(1.0, sum(taken.values()))
            rate = performance[lane][taken[lane]] / crowd if p.sms else max(0.0, 1 - sum(taken.values()))
            left[layer, p.nano] -= rate * step_us
            if left[layer, p.nano] <= 0:
                ended_us[layer] = now_us + step_us
                del running[lane]
        now_us += step_us
    return (ended_us[layers - 2] - ended_us[2]) / (layers - 4)


def test_a_gemm_keeps_what_the_others_leave() -> None:
    def slowdowns(*running: tuple[str, int | None]) -> tuple[float, ...]:
        return MEASURED.slowdowns(running)

    assert slowdowns(("down", None), ("mlp_reduce", 11)) == pytest.approx((1 / 0.9, 1))
    assert slowdowns(("qkv", None), ("attention/decode", 43), ("mlp_reduce", 22)) == pytest.approx((1 / 0.4, 1, 1))
    assert slowdowns(("qkv", 65), ("attention/decode", 43)) == (1, 1)
    assert slowdowns(("o", None), ("attention/decode", 97), ("mlp_reduce", 22)) == pytest.approx((math.inf, 1.1, 1.1))


@pytest.mark.parametrize("seed", range(6))
def test_periods_are_those_of_small_steps_of_time(seed: int) -> None:
    pieces = random_pieces(random.Random(seed))
    found_us = Fluid(PROBLEM, MEASURED, CHUNK).period_us(pieces)
    assert found_us == pytest.approx(period_in_steps_us(pieces), rel=0.004)


def test_a_period_is_that_of_the_whole_model_but_for_its_ends() -> None:
    fluid = Fluid(PROBLEM, MEASURED, CHUNK)
    shares = fluid.shares(random_pieces(random.Random(1)))
    schedule = schedule_of(LLAMA_70B.layer, PROBLEM, shares.timeline, CHUNK, shares.sms)
    assert predict(schedule, MEASURED, 1000).layer_us == pytest.approx(shares.timeline.period_us, rel=0.003)


def test_what_waits_for_itself_is_no_plan() -> None:
    whole = pieces_of(one_after_the_other(PROBLEM))
    fluid = Fluid(PROBLEM, MEASURED, CHUNK)
    assert fluid.period_us(whole) == pytest.approx(PROBLEM.sequential_us())
    assert fluid.period_us(whole[::-1]) == math.inf
    with pytest.raises(ValueError, match="follow what they read"):
        anneal(PROBLEM, MEASURED, whole[::-1], SMS, CHUNK, steps=1)


def test_annealed_plans_are_whole_and_no_longer() -> None:
    pieces = random_pieces(random.Random(2))
    before_us = Fluid(PROBLEM, MEASURED, CHUNK).period_us(pieces)
    found = anneal(PROBLEM, MEASURED, pieces, SMS, CHUNK, steps=1500, seed=3)
    assert found == anneal(PROBLEM, MEASURED, pieces, SMS, CHUNK, steps=1500, seed=3)
    assert found.timeline.period_us < 0.97 * before_us
    schedule = schedule_of(LLAMA_70B.layer, PROBLEM, found.timeline, CHUNK, found.sms)
    validate(schedule, LLAMA_70B.layer, LLAMA_70B.num_layers, a100.SMS)
    assert all(sms in SMS[nano.task] for nano, sms in found.sms.items())


def test_no_plan_of_a_tiny_layer_is_shorter() -> None:
    """All cuts, orders, layers and shares of two tasks that feed each other, on two chunks."""
    times = {name: PROBLEM[name] for name in ("o", "attention_reduce")}
    tasks = tuple(
        Task(
            name,
            task.lane,
            {(a, b): task.duration_us[4 * a, 4 * b] for a, b in combinations(range(3), 2)},
            task.operations,
        )
        for name, task in times.items()
    )
    tiny = Problem(2, tasks, (Dependency("o", "attention_reduce"), Dependency("attention_reduce", "o", 1)))
    sms = {"o": (None,), "attention_reduce": (11, 54)}
    fluid = Fluid(tiny, MEASURED, 4 * CHUNK)
    cuts = (((0, 2),), ((0, 1), (1, 2)))
    shortest_us = math.inf
    for ranges in product(cuts, repeat=2):
        nanos = [NanoTask(task.name, *r) for task, cut in zip(tasks, ranges, strict=True) for r in cut]
        for order in permutations(nanos):
            for ahead in product((0, 1), repeat=len(order)):
                for shares in product(*(sms[nano.task] for nano in order)):
                    pieces = tuple(Piece(*piece) for piece in zip(order, ahead, shares, strict=True))
                    shortest_us = min(shortest_us, fluid.period_us(pieces))
    # To cut two tasks at once is what the programs are for: a change cuts one, which helps nothing.
    start = tuple(Piece(NanoTask(task.name, *r), 0, sms[task.name][0]) for task in tasks for r in cuts[1])
    found = anneal(tiny, MEASURED, start, sms, 4 * CHUNK, steps=2000)
    assert found.timeline.period_us == pytest.approx(shortest_us)
    assert shortest_us < 0.9 * fluid.period_us(start)


def test_gemms_without_a_cap_shorten_a_plan_of_the_programs() -> None:
    """As the benchmark search_a100 starts: they use SMs that nobody else takes for part of their time."""
    plan = find_plans(PROBLEM, MEASURED, CHUNK, time_limit_s=20, parts=((2, 2),), turns=2)[0]
    released = tuple(
        p._replace(sms=None if PROBLEM[p.nano.task].lane == "compute" else p.sms or a100.SMS)
        for p in pieces_of(plan.shares)
    )
    assert Fluid(PROBLEM, MEASURED, CHUNK).period_us(released) < 0.99 * plan.predicted_us
