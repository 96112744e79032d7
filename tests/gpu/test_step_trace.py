"""A trace of a GPU's steps: the times of launches are in order in every lane, with CUDA graphs and without."""

from itertools import pairwise

import pytest
import torch
from support.places import ROOT

from nanoflow_backend.bench.offline_run import queue_all
from nanoflow_backend.bench.step_trace.command import launch_times
from nanoflow_backend.bench.step_trace.lanes import lane_launches
from nanoflow_backend.bench.step_trace.traced_steps import trace_steps
from nanoflow_backend.bench.workload import constant
from nanoflow_backend.engine import Engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STEPS, LAYERS = 7, 4
US = 1e-6


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("schedule", ["sequential", "nano-batched-2"])
def test_launches_of_a_lane_follow_each_other_and_waits_end_before(schedule: str, cuda_graphs: bool) -> None:
    engine = Engine.from_pretrained(
        ROOT / "demo" / "tiny-llama",
        kv_cache_tokens=4096,
        dense_batch_tokens=64,
        schedule=schedule,
        cuda_graphs=cuda_graphs,
    )
    times = launch_times(engine, engine.executor)
    queue_all(engine, constant(40, 30, 20))
    traced = trace_steps(engine, engine.executor.worker, times, STEPS, len)
    assert len(traced.steps) == STEPS
    for before, after in pairwise(traced.steps):
        assert before.forward_s[1] <= before.tail_s[0] + US
        assert before.tail_s[1] <= after.forward_s[0] + US
    for step in traced.steps:
        launches = lane_launches(step, LAYERS)
        assert {x.layer for x in launches} == set(range(LAYERS))
        for x in launches:
            assert step.forward_s[0] - US <= x.begin_s < x.end_s <= step.forward_s[1] + US
            assert x.idle_from_s <= x.begin_s + US
            assert x.awaited_s <= x.begin_s + US
    step_s = (traced.steps[-1].tail_s[1] - traced.steps[0].forward_s[0]) / STEPS
    assert step_s == pytest.approx(traced.wall_s / STEPS, rel=0.5), "the device's clock and the host's"
