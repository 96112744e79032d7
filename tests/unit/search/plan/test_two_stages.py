"""The two stages together, on published times."""

import pytest
from nanoflow_search.checkpoint import Run
from nanoflow_search.cost.workload import MeanWorkload
from nanoflow_search.plan.op_graph import layer_problem, schedule_of
from nanoflow_search.plan.two_stages import find_plans
from nanoflow_search.predict.timing_model import TimingModel
from nanoflow_search.request import Effort
from support.places import LLAMA_3_8B

from benchmarks.paper import a100_tables as a100
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.schedule.validate import validate

MODEL_8B = build(read_model_config(LLAMA_3_8B))
PROFILE_8B = a100.profile(MODEL_8B.layer, 1, a100.LLAMA_3_8B)


def test_8b_hides_decode_attention() -> None:
    """A third of what the benchmark search_a100 searches; its plan overlaps attention with the FFN's GEMMs."""
    measured = TimingModel(PROFILE_8B, MeanWorkload(512, 512).mix(1024))
    problem = layer_problem(MODEL_8B.layer, 1, 1024, 256, measured.operations_us)
    plan = find_plans(problem, measured, 256, Effort(turns=2, time_limit_s=20), Run(), part_limits=((2, 2),))[0]
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
