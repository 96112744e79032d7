"""A rank that runs alone, on the GPU: it computes what it does on a CPU, and its collectives take their time."""

import pytest
import torch
from msgspec.structs import replace
from nanoflow_kernels import device, reference
from nanoflow_search.cost.workload import Mix
from support.comparison import assert_close
from support.models.batches import Requests, forward
from support.models.shapes import CONFIGS, config

from benchmarks.overlap.exposure import Exposure
from nanoflow_backend.bench.step_trace.launch_times import RecordedLaunches
from nanoflow_backend.config.model_config import ModelConfig
from nanoflow_backend.config.network_table import NetworkHeader, NetworkTable
from nanoflow_backend.config.precision import FLOAT32
from nanoflow_backend.graph.collectives import AllReduceForm, Forms, in_forms
from nanoflow_backend.kvcache.kv_pages import KvPages
from nanoflow_backend.models.model import build
from nanoflow_backend.models.weights import dummy
from nanoflow_backend.runtime.binding import Binding
from nanoflow_backend.runtime.collectives.emulated import Emulated
from nanoflow_backend.runtime.cpu import CpuProgram
from nanoflow_backend.runtime.cuda import ON_GPU, CudaProgram
from nanoflow_backend.schedule.plan import Schedule
from nanoflow_backend.schedule.presets import alternating, sequential

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SMS = torch.cuda.get_device_properties().multi_processor_count if torch.cuda.is_available() else 0
RANKS, TOKENS = 2, 96
REDUCES = ("attention_reduce", "mlp_reduce")
FORMS = ({}, dict.fromkeys(REDUCES, AllReduceForm.SPLIT), dict.fromkeys(REDUCES, AllReduceForm.NORMED))


def network(gb_per_s: float = 100.0) -> NetworkTable:
    header = NetworkHeader(name="assumed", device="any", ranks=RANKS, source="a test")
    return NetworkTable.at_rate(header, sms=8, gb_per_s=gb_per_s)


def shape(name: str) -> ModelConfig:
    return config(name, hidden_size=512, intermediate_size=1024, head_dim=64, vocab_size=1000)


def halves(name: str, forms: Forms) -> Schedule:
    graph = in_forms(build(shape(name), RANKS).layer, forms, RANKS)
    plan = alternating(graph, TOKENS, TOKENS // 2, 0.5, {"network": 8, "compute": SMS - 8})
    return replace(plan, all_reduces=forms)


@pytest.mark.parametrize("forms", FORMS, ids=["whole", "split", "normed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_rank_alone_computes_what_it_does_on_a_cpu(name: str, forms: Forms) -> None:
    made_of = shape(name)
    model, requests = build(made_of, RANKS), Requests(made_of, [TOKENS // 3] * 3)
    plan, made, inputs = halves(name, forms), dummy(model), requests.inputs([(i, 0, TOKENS // 3) for i in range(3)])

    def program(where: str, kernels: object, **options: object) -> Binding:
        pages = KvPages.allocate(made_of, requests.num_pages, requests.page_tokens, torch.float32, RANKS, device=where)
        weights = {parameter: weight.to(where) for parameter, weight in made.items()}
        collectives = Emulated(network(), kernels)
        return Binding(
            model, [plan], weights, pages, collectives, kernels, max_tokens=TOKENS, precision=FLOAT32, **options
        )  # fmt: skip

    cpu = CpuProgram(program("cpu", reference))
    forward(cpu, inputs)
    expected = cpu.binding.results(cpu.plan)
    for cuda_graphs in (False, True):
        cuda = CudaProgram(program("cuda", device, **ON_GPU), max_rows=TOKENS, cuda_graphs=cuda_graphs)
        for _ in range(2):  # the second replays the capture
            forward(cuda, [value.cuda() for value in inputs])
        found = cuda.binding.results(cuda.plan_for(TOKENS, 0))
        for ours, theirs in zip(found, expected, strict=True):
            assert_close("results", ours.cpu(), theirs, 1e-4)


def test_collectives_take_their_time_in_the_engines_program() -> None:
    from nanoflow_search.hardware.plan_timer import PlanTimer

    slow = network(gb_per_s=0.5)
    timer = PlanTimer.here(shape("llama"), Mix(32, 64, 70, 20), network=slow, seconds=0.1, warm_s=0.05)
    graph = build(shape("llama"), RANKS).layer
    plan = alternating(graph, TOKENS, TOKENS // 2, 0.5, {"network": 8, "compute": SMS - 8})
    asked_us = 2 * slow.time("all_reduce", TOKENS * 512 * 2).us
    assert timer(sequential(graph, TOKENS)).layer_us >= 0.99 * asked_us
    watcher = RecordedLaunches(cuda_graphs=True)
    for schedule in (sequential(graph, TOKENS), plan):
        ran = timer.watch(schedule, watcher, runs=3)
        watcher.wait()
        found = Exposure.of(watcher.read(ran, watcher.lap), ran.bound)
        assert found.network_us >= 0.99 * asked_us
        assert 0 <= found.exposed_us <= found.network_us
