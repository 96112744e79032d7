"""From a model's graph to tasks, and from plans back to schedules that the engine accepts."""

import random
from itertools import pairwise

import pytest
from msgspec.structs import replace
from nanoflow_search.plan.op_graph import layer_problem, schedule_of
from nanoflow_search.plan.problem import TaskDependency
from nanoflow_search.plan.stage_one import stage_one
from support.models.shapes import CONFIGS, config
from support.places import LLAMA_3_8B, MODELS

from nanoflow_backend.config.quantization import AT_LOAD
from nanoflow_backend.graph.collectives import AllReduceForm, Forms, in_forms
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.schedule.validate import validate

MODEL_8B = build(read_model_config(LLAMA_3_8B))
MODEL_70B = build(read_model_config(MODELS / "llama-2-70b"), 8)


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
    follow = {TaskDependency(a, b, pages=b == "attention") for a, b in pairwise(names)}
    assert set(problem.dependencies) == follow | {TaskDependency("mlp_reduce", "qkv", layers_back=1)}
    assert problem.cycles() == [tuple(names)]


def test_tasks_of_a_layer_in_fp8_are_the_same() -> None:
    config = replace(read_model_config(LLAMA_3_8B), quantization=AT_LOAD, scaled_kv=True)
    problem = layer_problem(build(config).layer, 1, 4, 1, seeded_times(0))
    assert [(task.name, task.lane, task.operations) for task in problem.tasks] == [
        ("qkv", "compute", ("attention_norm", "qkv", "rope_append")),
        ("attention", "memory", ("attention",)),
        ("o", "compute", ("attention_quantise", "o", "attention_reduce")),
        ("gate_up", "compute", ("mlp_norm", "gate_up", "gate_up_quantise", "down", "mlp_reduce")),
    ]


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
    [
        *((name, 1, {}) for name in CONFIGS),
        ("llama", 2, {}),
        ("mixtral", 2, dict.fromkeys(("attention_reduce", "mlp_reduce"), AllReduceForm.SPLIT)),
        ("llama", 2, {"attention_reduce": AllReduceForm.GATHERED}),
        ("llama", 4, dict.fromkeys(("attention_reduce", "mlp_reduce"), AllReduceForm.NORMED)),
    ],
)
def test_every_plan_is_a_valid_schedule(name: str, tp: int, forms: Forms) -> None:
    model = build(config(name), tp)
    graph = in_forms(model.layer, forms, tp)
    problem = layer_problem(graph, tp, 24, 8, seeded_times(tp))
    front = ("qkv", "attention")
    after = next(task.name for task in problem.tasks if task.name not in front)
    groups = {task.name: "qkv" if task.name in front else after for task in problem.tasks}
    plan = stage_one(problem, dict.fromkeys(groups, 2), alike=groups, time_limit_s=10)
    assert plan.period_us <= problem.sequential_us() + 1e-6
    schedule = schedule_of(graph, problem, plan, 8, all_reduces=forms)
    validate(schedule, graph, num_layers=5, ranks=tp)
    assert schedule.tokens == 24
    assert len(schedule.launches) >= len(graph.operations)
