"""Annealed plans: against exhaustion on tiny layers; their periods against a simulation in small steps of time."""

import math
import random
from itertools import combinations, pairwise, permutations, product
from pathlib import Path

import pytest
from nanoflow_search.checkpoint import Run
from nanoflow_search.cost.workload import MeanWorkload
from nanoflow_search.plan.op_graph import layer_problem, schedule_of
from nanoflow_search.plan.problem import NanoTask, Problem, Task, TaskDependency
from nanoflow_search.plan.two_stages import find_plans, sequential_assignment
from nanoflow_search.predict.predict import predict
from nanoflow_search.predict.timing_model import RunningCurve
from nanoflow_search.request import Effort

from benchmarks.paper import a100_tables as a100
from benchmarks.paper.a100_case import released
from benchmarks.paper.anneal import anneal
from benchmarks.paper.fluid import Fluid
from benchmarks.paper.moves import MOST_LAYERS_AHEAD, Moves
from benchmarks.paper.piece import Parts, Piece, Pieces, count, divided
from benchmarks.paper.steady_period import Stint, settled
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.schedule.validate import validate

MODELS = Path(__file__).parents[2] / "models"
LLAMA_70B = build(read_model_config(MODELS / "llama-2-70b"), 8)
TOKENS, CHUNK = 2048, 256
MEASURED = a100.Published(
    a100.profile(LLAMA_70B.layer, 8, a100.LLAMA_2_70B_TP8, a100.RELEASE), MeanWorkload(512, 512).mix(TOKENS)
)
PROBLEM = layer_problem(LLAMA_70B.layer, 8, TOKENS, CHUNK, MEASURED.operations_us)
TENTHS = {share: round(share * a100.SMS) for share in a100.GEMM}
SMS = {task.name: (None,) if task.lane == "compute" else tuple(TENTHS.values()) for task in PROBLEM.tasks}
DECODES = 1024
FINER = {"qkv": Parts(3, 4), "attention": Parts(3, 5), "o": Parts(1, 2), "gate_up": Parts(1, 2)}


def random_pieces(rng: random.Random, problem: Problem = PROBLEM) -> Pieces:
    """Task after task, each cut at random; the last launches of a period are of a layer ahead."""
    found = []
    decoding = set(rng.sample(range(TOKENS), DECODES))
    for task in problem.tasks:
        cuts = sorted(rng.sample(range(1, problem.chunks), rng.randint(1, 2)))
        for start, stop in pairwise((0, *cuts, problem.chunks)):
            rows = range(start * CHUNK, stop * CHUNK) if task.name == "attention" else range(0)
            some = sum(row in decoding for row in rows)
            found.append(Piece(NanoTask(task.name, start, stop), 0, rng.choice(SMS[task.name]), some))
    turned = rng.randrange(len(found))
    return (*found[turned:], *(piece._replace(layers_ahead=1) for piece in found[:turned]))


def alone_us(piece: Piece) -> float:
    """With all of the device; attention's by the published times of its two kinds of rows."""
    task, start, stop = piece.nano
    if task != "attention":
        return PROBLEM[task].duration_us[start, stop]
    prompts = (stop - start) * CHUNK - piece.decodes
    rows = {"decode": (piece.decodes, MEASURED.mix.decode_context), "prefill": (prompts, MEASURED.mix.prefill_context)}
    times = a100.LLAMA_2_70B_TP8
    return sum(
        a100.line(times[f"attention/{kind}"], n * context / a100.CONTEXT) for kind, (n, context) in rows.items() if n
    )


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
    left = {(layer, p.nano): alone_us(p) for layer, p in launches}
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


def halves() -> Pieces:
    """Two halves of each task, one after the other, with all decodes in the first."""
    middle = PROBLEM.chunks // 2
    return tuple(
        Piece(
            NanoTask(task.name, *half), 0, SMS[task.name][0], DECODES if task.name == "attention" and not half[0] else 0
        )
        for task in PROBLEM.tasks
        for half in ((0, middle), (middle, PROBLEM.chunks))
    )


def test_a_gemm_keeps_what_the_others_leave() -> None:
    def slowdowns(*running: RunningCurve) -> tuple[float, ...]:
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


@pytest.mark.parametrize("seed", range(8))
def test_a_period_is_that_of_the_whole_model_but_for_its_ends(seed: int) -> None:
    """By `walk`, of the schedule that the engine would run: what twenty layers more take, and all thousand of them."""
    shares = Fluid(PROBLEM, MEASURED, CHUNK).shares(random_pieces(random.Random(seed)))
    schedule = schedule_of(LLAMA_70B.layer, PROBLEM, shares.timeline, CHUNK, shares.sms, groups=shares.groups)
    validate(schedule, LLAMA_70B.layer, LLAMA_70B.num_layers, a100.SMS)
    period_us = shares.timeline.period_us
    more_us = 60 * predict(schedule, MEASURED, 60).layer_us - 40 * predict(schedule, MEASURED, 40).layer_us
    assert more_us == pytest.approx(20 * period_us, rel=1e-6)
    assert predict(schedule, MEASURED, 1000).layer_us == pytest.approx(period_us, rel=0.003)


def test_two_lanes_that_slow_each_other_down() -> None:
    """A GEMM of 10 us, beside what another lane does on its result for 4 us and then, in another way, for 2 us."""
    gemm, first, second = ("gemm", None), ("attention", 40), ("attention", 20)
    paces: dict[tuple[RunningCurve | None, ...], tuple[float, ...]] = {
        (None, None): (1, 1),
        (gemm, None): (1, 1),
        (None, first): (1, 1),
        (None, second): (1, 1),
        (gemm, first): (2, 1.5),
        (gemm, second): (1.25, 1),
    }

    def stints(gemm_waits: int) -> list[Stint]:
        """So many periods for what the other lane does; which waits for the GEMM of its own period."""
        return [Stint(0, ((gemm, 10.0),), ((1, gemm_waits),)), Stint(1, ((first, 4.0), (second, 2.0)), ((0, 0),))]

    turns, beside = settled(stints(1), paces), settled(stints(2), paces)
    assert turns is not None
    assert beside is not None
    assert turns.period_us == pytest.approx(16)
    assert turns.spans_us[1][0] == pytest.approx(turns.spans_us[0][1])
    # 6 us at half of its speed, 2 us at four fifths, the rest alone
    assert beside.period_us == pytest.approx(6 + 2 + (10 - 3 - 1.6))
    assert settled(stints(0), paces) is None


def test_a_plan_comes_back_from_its_shares() -> None:
    fluid = Fluid(PROBLEM, MEASURED, CHUNK)
    for seed in range(20):
        pieces = random_pieces(random.Random(seed))
        again = fluid.pieces(fluid.shares(pieces))
        assert set(again) == set(pieces)
        assert fluid.period_us(again) == pytest.approx(fluid.period_us(pieces))


def test_changes_leave_a_plan_whole() -> None:
    """Every task on every chunk once, every decode on a row of its own, and as many parts as are asked for."""
    rng = random.Random(5)
    pieces = divided(halves(), FINER, "attention")
    changes = Moves(PROBLEM, SMS, FINER, CHUNK, rng)
    seen = 0
    for _ in range(4000):
        changed = changes.one(pieces)
        if changed is None:
            continue
        seen += changed != pieces
        pieces = changed
        for task in PROBLEM.tasks:
            edges = sorted(p.nano[1:] for p in pieces if p.nano.task == task.name)
            assert [edge for one in edges for edge in one] == sorted([0, *[e for _, e in edges for e in (e, e)]][:-1])
            parts = FINER.get(task.name, Parts())
            assert parts.least <= count(pieces, task.name, "attention")
            assert len(edges) <= parts.most
        assert sum(p.decodes for p in pieces) == DECODES
        for p in pieces:
            assert 0 <= p.decodes <= (p.nano.stop - p.nano.start) * CHUNK
            assert p.decodes == 0 or p.nano.task == "attention"
            assert 0 <= p.layers_ahead <= MOST_LAYERS_AHEAD
            assert p.sms in SMS[p.nano.task]
    assert seen > 2000


def test_what_waits_for_itself_is_no_plan() -> None:
    fluid = Fluid(PROBLEM, MEASURED, CHUNK)
    whole = fluid.pieces(sequential_assignment(PROBLEM))
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
    schedule = schedule_of(LLAMA_70B.layer, PROBLEM, found.timeline, CHUNK, found.sms, groups=found.groups)
    validate(schedule, LLAMA_70B.layer, LLAMA_70B.num_layers, a100.SMS)
    assert all(sms in SMS[nano.task] for nano, sms in found.sms.items())


def test_annealed_plans_have_the_parts_that_are_asked_for() -> None:
    """KQV and the attention of decodes finer than O and the FFN; and what cannot have them is refused."""
    start = halves()
    found = anneal(PROBLEM, MEASURED, start, SMS, CHUNK, steps=1500, seed=1, parts=FINER)
    pieces = Fluid(PROBLEM, MEASURED, CHUNK).pieces(found)
    for task, parts in FINER.items():
        assert parts.least <= count(pieces, task, "attention") <= parts.most
    assert found.timeline.period_us < 0.97 * Fluid(PROBLEM, MEASURED, CHUNK).period_us(
        divided(start, FINER, "attention")
    )
    with pytest.raises(ValueError, match="at most 1 of o"):
        divided(start, {"o": Parts(1, 1)}, "attention")
    with pytest.raises(ValueError, match="qkv to be cut in 9 parts"):
        divided(start, {"qkv": Parts(9, 9)}, "attention")


def test_parts_that_are_cut_for_the_least_are_not_more_than_the_most() -> None:
    """Attention in five pieces of which one has all decodes: only cuts of that one count towards the least."""
    edges = (0, PROBLEM.chunks - 4, *range(PROBLEM.chunks - 3, PROBLEM.chunks + 1))
    five = tuple(
        Piece(NanoTask("attention", start, stop), 0, TENTHS[0.4], 0 if start else DECODES)
        for start, stop in pairwise(edges)
    )
    assert divided(five, {"attention": Parts(1, 5)}, "attention") == five
    seven = divided(five, {"attention": Parts(3, 7)}, "attention")
    assert (len(seven), count(seven, "attention", "attention")) == (7, 3)
    with pytest.raises(ValueError, match="at most 5 of attention"):
        divided(five, {"attention": Parts(3, 5)}, "attention")


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
    tiny = Problem(2, tasks, (TaskDependency("o", "attention_reduce"), TaskDependency("attention_reduce", "o", 1)))
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
    plan = find_plans(PROBLEM, MEASURED, CHUNK, Effort(turns=2, time_limit_s=20), Run(), part_limits=((2, 2),))[0]
    fluid = Fluid(PROBLEM, MEASURED, CHUNK)
    assert fluid.period_us(released(PROBLEM, fluid.pieces(plan.shares))) < 0.99 * plan.predicted_us
