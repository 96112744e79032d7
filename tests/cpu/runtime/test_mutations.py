"""A schedule without one of its waits, and a buffer plan with one value in the wrong place: each must be caught."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nanoflow_kernels import reference
from support.comparison import assert_close
from support.models.batches import Requests, forward
from support.models.cases import LENGTHS, TOKENS, Case
from support.models.shapes import CONFIGS, config
from support.runtime.dry_program import dry_program, mutants, overtaken, refuses, run, run_forward
from support.runtime.row_conflicts import conflicts
from support.schedule.schedules import delayed, in_lanes, interleavings, plans, random_schedule, without_wait
from torch import Tensor

from nanoflow_backend.config.precision import FLOAT32
from nanoflow_backend.graph.builder import GraphBuilder
from nanoflow_backend.graph.model import Model
from nanoflow_backend.graph.operation import Graph
from nanoflow_backend.models.blocks import decoder, rotary
from nanoflow_backend.models.model import build
from nanoflow_backend.runtime import binding
from nanoflow_backend.runtime.binding import Binding
from nanoflow_backend.runtime.buffers import Buffer, BufferPlan, LayerValue, plan_buffers
from nanoflow_backend.runtime.collectives.one_rank import OneRank
from nanoflow_backend.runtime.cpu import CpuProgram
from nanoflow_backend.runtime.tags import StaleRead
from nanoflow_backend.schedule.order import PartialOrder
from nanoflow_backend.schedule.plan import Schedule, ScheduleError, Wait
from nanoflow_backend.schedule.presets import nano_batched
from nanoflow_backend.schedule.validate import validate


@pytest.mark.parametrize("name", CONFIGS)
def test_without_a_wait_validation_fails_and_some_interleaving_reads_too_early(name: str) -> None:
    model, rng = build(config(name)), random.Random(0)
    killed = 0
    for schedule in [*plans(model.layer, 8).values(), *(random_schedule(model.layer, 8, rng) for _ in range(8))]:
        for number, wait in mutants(schedule):
            mutant = without_wait(schedule, number, wait)
            with pytest.raises(ScheduleError, match="may start before"):
                validate(mutant, model.layer, 3)
            order, program = PartialOrder(mutant, 3), dry_program(model, mutant)
            assert any(refuses(program, late) for late in overtaken(order, wait, number)), (number, wait)
            killed += 1
    assert killed > 220, killed


def test_without_a_wait_the_logits_are_wrong_too(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The same mutants with the tags switched off: what they refuse would really have computed something else."""
    case = Case(tmp_path_factory.mktemp("llama"), "llama", LENGTHS, num_hidden_layers=2)
    graph, batch = case.model.layer, [(2, 0, TOKENS)]  # one request, so that every page is read across nano-batches
    inputs, expected = case.requests.inputs(batch), case.requests.rows(case.logits, batch)
    killed = 0
    for schedule in plans(graph, TOKENS).values():
        for number, wait in mutants(schedule):
            mutant = without_wait(schedule, number, wait)
            program = case.program(mutant)
            program.tags_of[program.binding.plans[0]] = Untagged()
            program.checked = False  # poison is read, and nobody objects
            wrong = False
            for late in overtaken(PartialOrder(mutant, 2), wait, number):
                for pages in program.binding.kv.tensor:
                    pages.fill_(torch.nan)
                for buffer in program.binding.buffers:
                    buffer.fill_(torch.nan)
                forward(program, inputs, order=late)
                error = (program.head(torch.arange(TOKENS)) - expected).abs().max()
                wrong |= not error < 1e-3  # NaN is no match either
            assert wrong, (number, wait)
            killed += 1
    assert killed > 100, killed


class Untagged:
    def embed(self) -> None: ...

    def launch(self, step: int) -> None: ...

    def read_results(self) -> None: ...


# graphs small enough for every interleaving of two layers


def attention_model(num_layers: int) -> Model:
    """A layer of five operations; the update that it carries is attention's alone."""
    shape = config("llama", num_layers=num_layers)
    g = GraphBuilder()
    residual, update = g.input("residual", 16), g.input("update", 16)
    batch = g.batch()
    residual, x = g.add_rms_norm("norm", residual, update, decoder.norm(g, "input_layernorm", shape), 1e-5)
    qkv = g.linear("qkv", x, *decoder.qkv_parameters(g, shape))
    q, pages = g.rope_append("rope_append", qkv, batch, rotary.frequencies(g, shape), 2, head_dim=shape.head_dim)
    attended = g.attention("attention", q, pages, batch)
    layer = g.build(residual, g.linear("o", attended, *decoder.o_parameters(g, shape)))
    return Model(decoder.embedding(shape), (layer,), (0,) * num_layers, decoder.lm_head(shape))


def attention_schedules(graph: Graph) -> dict[str, Schedule]:
    two = nano_batched(graph, 6, 2)
    return {
        "resources": two,
        "append apart": in_lanes(two, graph, {"rope_append": "append"}),
        "norm and o apart": in_lanes(two, graph, {"norm": "norm", "o": "o"}),
        "a lane for each": in_lanes(two, graph, {op.name: op.name for op in graph.operations}),
    }


def plain_forward(model: Model, weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Hidden states of one request [T, D], written out without graph, pages or buffers."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    x, positions = weights["embed.weight"][ids], torch.arange(len(ids))
    for i in range(model.num_layers):
        qkv = norm(x, weights[f"layers.{i}.input_layernorm.weight"]) @ weights[f"layers.{i}.qkv.weight"].T
        turn = torch.polar(torch.ones(()), positions[:, None] * weights[f"layers.{i}.rope.frequencies"])[:, None]
        heads = qkv.view(len(ids), 12, 4)
        paired = torch.view_as_complex(heads[:, :10].unflatten(-1, (2, 2)).transpose(-1, -2).contiguous()) * turn
        q, k = torch.view_as_real(paired).transpose(-1, -2).flatten(-2).split((8, 2), 1)
        k, v = k.repeat_interleave(4, 1), heads[:, 10:].repeat_interleave(4, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / 2 + torch.full((len(ids), len(ids)), -torch.inf).triu(1)
        x = x + torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1) @ weights[f"layers.{i}.o.weight"].T
    return norm(x, weights["norm.weight"]) @ weights["lm_head.weight"].T


@pytest.fixture(scope="module")
def attention() -> SimpleNamespace:
    model, rng = attention_model(2), torch.Generator().manual_seed(0)
    weights: dict[str, Tensor] = {}
    graphs = {"": [model.embed, model.head], "layers.0.": [model.layer], "layers.1.": [model.layer]}
    for prefix, parts in graphs.items():
        for p in (p for graph in parts for p in graph.parameters):
            weights[prefix + p.name] = (
                torch.tensor(p.constant) if p.constant else torch.randn(p.shape, generator=rng) / p.shape[-1] ** 0.5
            )
    requests = Requests(config("llama", num_layers=2), [6, 2])
    expected = [plain_forward(model, weights, ids) for ids in requests.ids]
    return SimpleNamespace(model=model, weights=weights, requests=requests, expected=expected)


def program_of(attention: SimpleNamespace, schedule: Schedule) -> CpuProgram:
    pages = attention.requests.empty_pages()
    options: dict[str, Any] = {"max_tokens": 6, "precision": FLOAT32}
    return CpuProgram(Binding(attention.model, [schedule], attention.weights, pages, OneRank(), reference, **options))


def test_every_interleaving_of_two_layers_gives_the_same_logits(attention: SimpleNamespace) -> None:
    batch = [(0, 0, 4), (1, 0, 2)]
    inputs, expected = attention.requests.inputs(batch), attention.requests.rows(attention.expected, batch)
    ran = []
    for name in ("resources", "append apart", "norm and o apart"):
        schedule = attention_schedules(attention.model.layer)[name]
        program = program_of(attention, schedule)
        ran.append(0)
        for order in interleavings(PartialOrder(schedule, 2)):
            program.binding.kv.tensor.fill_(torch.nan)
            forward(program, inputs, order=order)
            assert_close(f"logits in the order {order}", program.head(torch.arange(6)), expected)
            ran[-1] += 1
    assert ran == [128, 2312, 410]


def test_no_interleaving_of_a_valid_schedule_is_refused(attention: SimpleNamespace) -> None:
    """By the tags alone, so that many more can be run."""
    layer = build(config("llama", num_layers=1))
    cases = [
        (layer, plans(layer.layer, 8)["append in the network lane"], 1220),
        (attention.model, attention_schedules(attention.model.layer)["a lane for each"], 14041),
    ]
    for model, schedule, expected in cases:
        program, ran = dry_program(model, schedule), 0
        for order in interleavings(PartialOrder(schedule, model.num_layers)):
            run(program, order)
            ran += 1
        assert ran == expected


def test_without_a_wait_one_of_all_interleavings_is_refused(attention: SimpleNamespace) -> None:
    tried = killed = 0
    for schedule in attention_schedules(attention.model.layer).values():
        for number, wait in mutants(schedule):
            mutant = without_wait(schedule, number, wait)
            program = dry_program(attention.model, mutant)
            killed += any(refuses(program, order) for order in interleavings(PartialOrder(mutant, 2)))
            tried += 1
    assert killed == tried > 30


# the buffer plan


def moved(plan: BufferPlan, value: LayerValue, buffer: int, width: int) -> BufferPlan:
    buffers = list(plan.buffers)
    buffers[buffer] = Buffer(max(width, buffers[buffer].width), buffers[buffer].dtype)
    return BufferPlan(tuple(buffers), {**plan.holder, value: buffer})


def test_a_value_in_the_wrong_buffer_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every value moved into every other buffer: tags refuse some interleaving just where rows conflict."""
    model = build(config("llama")).with_layers(2)
    graph = model.layer
    caught = harmless = 0
    for name in ("sequential", "two", "append in the network lane", "ahead"):
        schedule = plans(graph, 8)[name]
        plan, order = plan_buffers((graph,) * 2, schedule), PartialOrder(schedule, 2)
        for value, home in plan.holder.items():
            for buffer in set(range(len(plan.buffers))) - {home}:
                wrong = moved(plan, value, buffer, graph.values[value.name].width)
                with monkeypatch.context() as patch:
                    patch.setattr(binding, "plan_buffers", lambda *_, wrong=wrong: wrong)
                    program = dry_program(model, schedule)
                refused = any(refuses(program, delayed(order, k)) for k in range(len(order.steps)))
                assert refused == bool(conflicts(wrong, graph, schedule, 2, 8)), (name, value, buffer)
                caught += refused
                harmless += not refused
    assert caught > 100, caught
    assert harmless > 0, harmless


def test_the_refusal_names_launch_value_and_rows() -> None:
    model = build(config("llama"))
    schedule = nano_batched(model.layer, 8, 2)
    at = {(x.operation, x.start): i for i, x in enumerate(schedule.launches)}
    mutant = without_wait(schedule, at["rope_append", 4], Wait(at["qkv", 4]))
    order = PartialOrder(mutant, 3)
    for through in (run, run_forward):
        with pytest.raises(
            StaleRead,
            match=r"launch 5 \(rope_append 4\.\.8\) in layer 1 reads 'qkv' of layer 1, but its rows 4\.\.8 hold "
            r"'gate_up' of layer 0",
        ):
            through(dry_program(model, mutant), delayed(order, order.index[1, at["qkv", 4]]))
