"""From a model's graph and a profile to schedules that the engine accepts."""

import random
from itertools import pairwise
from pathlib import Path

import pytest
from nanoflow_search.cost.model import Workload
from nanoflow_search.cost.work import Mix
from nanoflow_search.plan.op_graph import layer_problem, schedule_of
from nanoflow_search.plan.problem import Dependency
from nanoflow_search.plan.stage_one import stage_one
from nanoflow_search.plan.stage_two import Side
from nanoflow_search.plan.two_stages import find_plans
from nanoflow_search.predict.timing_model import Measured
from nanoflow_search.profile.data import Header, Pair, Point, Profile, ProfileError
from shapes import CONFIGS, config

from benchmarks.paper import a100_tables as a100
from nanoflow_backend.config.precision import BFLOAT16
from nanoflow_backend.graph.collectives import split_all_reduce
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.schedule.validate import validate

MODELS = Path(__file__).parents[4] / "benchmarks" / "models"
MODEL_8B = build(read_model_config(MODELS / "llama-3-8b"))
MODEL_70B = build(read_model_config(MODELS / "llama-2-70b"), 8)
PROFILE_8B = a100.profile(MODEL_8B.layer, 1, a100.LLAMA_3_8B)


def seeded_times(seed: int):
    rng = random.Random(seed)
    fixed: dict[tuple[str, ...], tuple[float, float]] = {}

    def times(run: tuple[str, ...], start: int, stop: int) -> float:
        launch, slope = fixed.setdefault(run, (rng.uniform(1, 9), rng.uniform(1, 20)))
        return launch + slope * (stop - start)

    return times


def test_tasks_of_a_layer() -> None:
    problem = layer_problem(MODEL_70B.layer, 8, 4, 1, seeded_times(0))
    assert [(task.name, task.lane, task.operations) for task in problem.tasks] == [
        ("qkv", "compute", ("attention_norm", "qkv", "rope_append")),
        ("attention", "memory", ("attention",)),
        ("o", "compute", ("o",)),
        ("attention_reduce", "network", ("attention_reduce",)),
        ("gate_up", "compute", ("mlp_norm", "gate_up", "down")),
        ("mlp_reduce", "network", ("mlp_reduce",)),
    ]
    names = [task.name for task in problem.tasks]
    follow = {Dependency(a, b, pages=b == "attention") for a, b in pairwise(names)}
    assert set(problem.dependencies) == follow | {Dependency("mlp_reduce", "qkv", layers_back=1)}
    assert problem.cycles() == [tuple(names)]


def test_a_collective_of_one_rank_is_no_task() -> None:
    problem = layer_problem(MODEL_8B.layer, 1, 4, 1, seeded_times(0))
    assert [(task.name, task.operations[-1]) for task in problem.tasks] == [
        ("qkv", "rope_append"),
        ("attention", "attention"),
        ("o", "attention_reduce"),
        ("gate_up", "mlp_reduce"),
    ]
    assert problem.lanes == ("compute", "memory")


def test_chunks_fill_the_batch() -> None:
    with pytest.raises(ValueError, match="chunk_tokens: expected a divisor of 2048, got 300"):
        layer_problem(MODEL_8B.layer, 1, 2048, 300, seeded_times(0))


@pytest.mark.parametrize(
    ("name", "tp", "forms"),
    [*((name, 1, ()) for name in CONFIGS), ("llama", 2, ()), ("mixtral", 2, ("attention_reduce", "mlp_reduce"))],
)
def test_every_plan_is_a_valid_schedule(name: str, tp: int, forms: tuple[str, ...]) -> None:
    model = build(config(name), tp)
    graph = split_all_reduce(model.layer, forms, tp)
    problem = layer_problem(graph, tp, 24, 8, seeded_times(tp))
    groups = {task.name: problem.tasks[0].name if task.name in ("qkv", "attention") else "o" for task in problem.tasks}
    plan = stage_one(problem, dict.fromkeys(groups, 2), alike=groups, time_limit_s=10)
    assert plan.period_us <= problem.sequential_us() + 1e-6
    schedule = schedule_of(graph, problem, plan, 8, split_all_reduces=forms)
    validate(schedule, graph, num_layers=5)
    assert schedule.tokens == 24
    assert len(schedule.launches) >= len(graph.operations)


def test_attention_takes_what_its_tokens_need() -> None:
    """The first tokens of a batch decode, over their contexts; the others are of prompts."""
    measured = Measured(PROFILE_8B, Mix(400, 624, 1024.0, 1024.0))
    decode, prefill = 997 / 384, 63 / 640
    assert measured.times(("attention",), 0, 400) == pytest.approx(400 * decode)
    assert measured.times(("attention",), 300, 500) == pytest.approx(100 * decode + 100 * prefill)
    assert measured.times(("attention",), 400, 1024) == pytest.approx(624 * prefill)
    longer = Measured(PROFILE_8B, Mix(400, 624, 2048.0, 1024.0))
    assert longer.times(("attention",), 0, 400) == pytest.approx(800 * decode)
    assert measured.times(("attention_norm", "qkv"), 0, 384) == pytest.approx(84)
    with pytest.raises(ProfileError, match="router was not measured"):
        measured.times(("router",), 0, 1)


def test_tasks_slow_down_as_their_operations_do() -> None:
    """Attention decodes for 300 of its 400 us and the others are of prompts; gate_up is followed by down."""

    def point(operation: str, us: float, sms: int = 100) -> Point:
        return Point(operation=operation, amount=1024.0, sms=sms, duration_us=us, dynamic_j=0.1, clock_mhz=1500.0)

    def pair(first: str, second: str, sms: int | None, slowdowns: tuple[float, float]) -> Pair:
        return Pair(first=first, first_sms=None, second=second, second_sms=sms, first_slowdown=slowdowns[0],
                    second_slowdown=slowdowns[1], power_w=0.0, clock_mhz=1500.0)  # fmt: skip

    layer = MODEL_8B.layer
    points = [point(op.name, {"gate_up": 600.0, "down": 200.0}.get(op.name, 0.0)) for op in layer.operations]
    for sms in (32, 100):
        points += [point("attention/decode", 300.0, sms), point("attention/prefill", 100.0, sms)]
    pairs = (
        pair("gate_up", "attention/decode", 32, (1.1, 1.6)),
        pair("gate_up", "attention/prefill", 32, (1.5, 2.0)),
        pair("down", "attention/decode", 32, (1.3, 1.2)),
    )
    header = Header(
        model_fingerprint="f",
        precision=BFLOAT16,
        device="d",
        device_sms=100,
        tensor_parallel=1,
        static_w=0,
        power_cap_w=1e9,
    )
    measured = Measured(Profile(header=header, points=tuple(points), pairs=pairs), Mix(2, 2, 512.0, 512.0))
    problem = layer_problem(layer, 1, 4, 2, measured.times)
    whole = stage_one(problem, {task.name: 1 for task in problem.tasks})
    found = measured.contention(problem, whole, 2)
    ffn, read = Side("gate_up", None), Side("attention", 32)
    weights = {"gate_up": (300.0, 100.0), "down": (300.0,)}  # of decodes and prompts
    ffn_by, read_by = {"gate_up": (1.1, 1.5), "down": (1.3,)}, {"gate_up": (1.6, 2.0), "down": (1.2,)}
    long = {"gate_up": 600.0, "down": 200.0}

    def mean(slowdowns: dict[str, tuple[float, ...]]) -> float:
        parts = [(long[op] * w, s) for op in long for w, s in zip(weights[op], slowdowns[op], strict=True)]
        return sum(w * s for w, s in parts) / sum(w for w, _ in parts)

    assert found.slowdown == pytest.approx({(ffn, read): mean(ffn_by), (read, ffn): mean(read_by)})
    assert {c.sms for nano, choices in found.choices.items() if nano.task == "attention" for c in choices} == {None, 32}


def test_8b_hides_decode_attention() -> None:
    """A third of what the benchmark search_a100 searches; its plan overlaps attention with the FFN's GEMMs."""
    measured = Measured(PROFILE_8B, Workload(512, 512).mix(1024))
    problem = layer_problem(MODEL_8B.layer, 1, 1024, 256, measured.times)
    plan = find_plans(problem, measured, 256, time_limit_s=20, parts=((2, 2),), turns=2)[0]
    assert plan.gain > 1.03
    assert plan.predicted_us == pytest.approx(problem.sequential_us() / plan.gain)
    spans = {
        name: [(p.start_us, p.start_us + p.duration_us) for p in plan.shares.timeline.placed if p.nano.task == name]
        for name in ("attention", "gate_up")
    }
    period = plan.predicted_us
    assert any(
        a < other_stop + shift * period and start + shift * period < b
        for a, b in spans["attention"]
        for start, other_stop in spans["gate_up"]
        for shift in (-1, 0, 1)
    )
    schedule = schedule_of(MODEL_8B.layer, problem, plan.shares.timeline, 256, plan.shares.sms)
    validate(schedule, MODEL_8B.layer, MODEL_8B.num_layers, device_sms=a100.SMS)
