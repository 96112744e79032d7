"""Contention: how tasks slow each other down, from what was measured of their operations."""

import pytest
from nanoflow_search.cost.workload import Mix
from nanoflow_search.plan.contention import TaskShare, measured_contention
from nanoflow_search.plan.op_graph import layer_problem
from nanoflow_search.plan.stage_one import stage_one
from nanoflow_search.predict.timing_model import TimingModel
from nanoflow_search.profile.data import Pair, Profile, ProfileHeader
from nanoflow_search.profile.load import Point
from support.places import LLAMA_3_8B

from nanoflow_backend.config.precision import BFLOAT16
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build

MODEL_8B = build(read_model_config(LLAMA_3_8B))


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
    header = ProfileHeader(
        model_fingerprint="f",
        precision=BFLOAT16,
        device="d",
        device_sms=100,
        tensor_parallel=1,
        static_w=0,
        power_cap_w=1e9,
    )
    measured = TimingModel(Profile(header=header, points=tuple(points), pairs=pairs), Mix(2, 2, 512.0, 512.0))
    problem = layer_problem(layer, 1, 4, 2, measured.operations_us)
    whole = stage_one(problem, {task.name: 1 for task in problem.tasks})
    found = measured_contention(measured, problem, whole, 2)
    ffn, read = TaskShare("gate_up", None), TaskShare("attention", 32)
    weights = {"gate_up": (300.0, 100.0), "down": (300.0,)}  # of decodes and prompts
    ffn_by, read_by = {"gate_up": (1.1, 1.5), "down": (1.3,)}, {"gate_up": (1.6, 2.0), "down": (1.2,)}
    long = {"gate_up": 600.0, "down": 200.0}

    def mean(slowdowns: dict[str, tuple[float, ...]]) -> float:
        parts = [(long[op] * w, s) for op in long for w, s in zip(weights[op], slowdowns[op], strict=True)]
        return sum(w * s for w, s in parts) / sum(w for w, _ in parts)

    assert found.slowdown == pytest.approx({(ffn, read): mean(ffn_by), (read, ffn): mean(read_by)})
    assert {c.sms for nano, choices in found.choices.items() if nano.task == "attention" for c in choices} == {None, 32}
