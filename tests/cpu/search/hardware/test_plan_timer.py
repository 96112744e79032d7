"""The timer of plans, with the CPU's program in place of the GPU's and a GPU in simulated time."""

from typing import Any

import pytest
import torch
from msgspec.structs import replace
from nanoflow_search.cost.workload import Mix
from nanoflow_search.emit.trials import run_trials
from nanoflow_search.hardware.plan_timer import DISTINCT_LAYERS, PlanTimer
from support.models.shapes import CONFIGS, config
from support.simulated.gpu import IDLE_W
from support.simulated.programs import LAUNCH_S, Programs

from nanoflow_backend.config.network_table import NetworkHeader, NetworkTable
from nanoflow_backend.config.precision import FLOAT32, Precision
from nanoflow_backend.config.quantization import AT_LOAD, FP8
from nanoflow_backend.graph.collectives import AllReduceForm, in_forms
from nanoflow_backend.models.model import build
from nanoflow_backend.runtime.collectives.emulated import Emulated
from nanoflow_backend.schedule.layout import deal
from nanoflow_backend.schedule.presets import nano_batched, overlapped, sequential

MIX = Mix(10.0, 14.0, 9.0, 4.0)
FP8_KV = Precision(weights="float32", activations="float32", kv=FP8)
LAYERS = 6
REDUCES = ("attention_reduce", "mlp_reduce")


def timer(name: str, in_fp8: bool = False, **options: Any) -> tuple[PlanTimer, Programs]:
    programs = Programs(LAYERS)
    fp8 = {"quantization": AT_LOAD, "scaled_kv": True} if in_fp8 else {}
    shape = config(name, num_layers=LAYERS, **fp8)
    made = PlanTimer(
        shape, MIX, programs.gpu, programs, programs.burst, page_tokens=4, seconds=0.2, device="cpu",
        sleep=programs.gpu.sleep, precision=FP8_KV if in_fp8 else FLOAT32, **options
    )  # fmt: skip
    return made, programs


@pytest.mark.parametrize("name", CONFIGS)
def test_plans_run_on_shared_weights_and_pages(name: str) -> None:
    made, programs = timer(name)
    layer = build(config(name)).layer
    for schedule in (sequential(layer, 24), nano_batched(layer, 24, 2)):
        found = made(schedule)
        assert found.layer_us == pytest.approx(len(schedule.launches) * LAUNCH_S * 1e6, rel=0.02)
        assert found.power_w >= IDLE_W
        assert found.layer_j == pytest.approx(found.power_w * found.layer_us * 1e-6)
    one, other = (program.binding for program in programs.made)
    assert one.weights is other.weights
    assert [one.kv.layer(i).data_ptr() for i in range(LAYERS)] == [other.kv.layer(i).data_ptr() for i in range(LAYERS)]
    assert len({one.kv.layer(i).data_ptr() for i in range(LAYERS)}) == DISTINCT_LAYERS < LAYERS
    assert one.weights["layers.5.o.weight"] is one.weights["layers.1.o.weight"]
    results = [program.binding.results(program.plan) for program in programs.made]
    for a, b in zip(*results, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_plans_in_fp8_run_on_quantised_weights_and_pages(name: str) -> None:
    made, programs = timer(name, in_fp8=True, num_layers=2)
    layer = build(config(name, quantization=AT_LOAD, scaled_kv=True)).layer
    made(sequential(layer, 24))
    (program,) = programs.made
    assert program.binding.weights["layers.1.down.weight"].dtype == torch.float8_e4m3fn
    keys = program.binding.kv.layer(1)
    assert keys.dtype == torch.float8_e4m3fn
    assert keys.float().std().item() == pytest.approx(1, rel=0.2)
    for result in program.binding.results(program.plan):
        assert result.isfinite().all()
        assert result.std() > 0


def test_rows_lie_in_the_plans_groups() -> None:
    made, programs = timer("llama", num_layers=2)
    layer = build(config("llama")).layer
    halves = overlapped(layer, 24, 12, 0.4, 1, 2)
    for schedule in (sequential(layer, 24), halves):
        made(schedule)
    layout = deal(10, 24, halves.groups)
    assert layout is not None
    expected, found = (program.binding.results(program.plan) for program in programs.made)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b[layout.place])


def test_a_pair_of_plans_is_built_once() -> None:
    made, programs = timer("llama")
    layer = build(config("llama")).layer
    plan = nano_batched(layer, 24, 2)
    found = run_trials({"512/1024": made}, sequential(layer, 24), [plan], rounds=3)
    assert len(programs.made) == 2
    assert found.trials[0].gain.mean == pytest.approx(
        len(layer.operations) / len(plan.launches), rel=0.02
    )  # fmt: skip
    assert found.chosen is None


def test_fewer_layers_and_other_batches() -> None:
    made, programs = timer("llama", num_layers=2)
    layer = build(config("llama")).layer
    made(sequential(layer, 24))
    assert programs.made[0].binding.model.num_layers == 2
    with pytest.raises(ValueError, match="expected one for batches of 24 tokens, got 16"):
        made(sequential(layer, 16))


def network(ranks: int) -> NetworkTable:
    header = NetworkHeader(name="assumed", device="cpu", ranks=ranks, source="a test")
    return NetworkTable.at_rate(header, sms=8, gb_per_s=10.0)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_rank_alone_runs_its_shard_in_every_form(name: str) -> None:
    made, programs = timer(name, network=network(2))
    graph = build(config(name, num_layers=LAYERS), 2).layer
    forms = ({}, {"attention_reduce": AllReduceForm.GATHERED}, dict.fromkeys(REDUCES, AllReduceForm.SPLIT))
    for form in forms:
        base = nano_batched(in_forms(graph, form, 2), 24, 2)
        made(replace(base, all_reduces=form))
    bindings = [program.binding for program in programs.made]
    assert len(bindings) == len(forms)
    assert bindings[0].kv.tensor.shape[3] == 1, "half of the heads"
    for weight, found in bindings[0].weights.items():
        assert bindings[-1].weights[weight] is found, "drawn once"
    for program in programs.made:
        assert isinstance(program.binding.collectives, Emulated)
        for result in program.binding.results(program.plan):
            assert result.isfinite().all()


def test_another_network_has_the_same_weights_and_as_many_ranks() -> None:
    made, programs = timer("llama", network=network(2))
    layer = build(config("llama"), 2).layer
    other = made.on(network(2))
    for one in (made, other, made):
        one(sequential(layer, 24))
    first, second = (program.binding for program in programs.made)
    assert first.weights is second.weights
    assert first.kv is second.kv
    assert first.collectives is not second.collectives
    with pytest.raises(ValueError, match="network: expected one of 2 ranks, got 4"):
        made.on(network(4))
    with pytest.raises(ValueError, match="expected one of 1 ranks, got 2"):
        timer("llama")[0].on(network(2))
