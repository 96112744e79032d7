"""What the profiler launches: on random operands, kernels of every operation run and get what an engine gives them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from nanoflow_kernels import reference
from nanoflow_search.cost.workload import Mix
from nanoflow_search.hardware.inputs import SETS, OperationInputs
from nanoflow_search.hardware.steady_batch import SteadyBatch, decode_requests, prompt_requests, requests_of
from nanoflow_search.profile.load import Load, ProfileError
from nanoflow_search.request import SearchRequest
from support.models.shapes import CONFIGS, WITH_NORMS, config

from nanoflow_backend.config.precision import FLOAT32, Precision
from nanoflow_backend.config.quantization import AT_LOAD, FP8
from nanoflow_backend.graph.operation import Resource
from nanoflow_backend.models.model import build

MIX = Mix(6.0, 10.0, 9.0, 4.0)
# Whole blocks of 128, for scales of blocks.
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_heads": 8, "num_kv_heads": 4, "head_dim": 32}
IN_BLOCKS = replace(AT_LOAD, weights="block", activations="group")
SHAPES = {
    **{name: config(name, sliding_window=5) for name in WITH_NORMS},
    **{f"{name} in FP8": config(name, quantization=AT_LOAD, scaled_kv=True, sliding_window=5) for name in CONFIGS},
    "static scales": config("llama", quantization=replace(AT_LOAD, activations="static"), sliding_window=5),
    "scales of blocks": config("llama", quantization=IN_BLOCKS, sliding_window=5, **WIDE),
}


class Recorded:
    """The reference kernels, and the arguments of every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        names = {op.kernel for shape in SHAPES.values() for op in build(shape).layer.operations}
        self.kernels = SimpleNamespace(
            plan_attention=lambda *arguments, window, num_sms: f"plan of {window} on {num_sms}",
            **{name: self._recorded(name) for name in names if hasattr(reference, name)},
        )

    def _recorded(self, name: str) -> Any:
        def run(*arguments: Any, out: Any, num_sms: int | None = None, plan: Any = None, **attributes: Any) -> None:
            self.calls.append((name, arguments, {"out": out, "num_sms": num_sms, "plan": plan}))
            getattr(reference, name)(*arguments, out=out, **attributes)

        return run


def operands(name: str, recorded: Recorded, mix: Mix = MIX) -> OperationInputs:
    shape = SHAPES[name]
    precision = Precision(weights="float32", activations="float32", kv=FP8) if shape.scaled_kv else FLOAT32
    return OperationInputs(shape, mix, recorded.kernels, page_tokens=4, precision=precision, device="cpu")


@pytest.mark.parametrize("name", SHAPES)
def test_every_operation_runs_on_every_set(name: str) -> None:
    recorded = Recorded()
    made = operands(name, recorded)
    for op in made.graph.operations:
        if op.resource is Resource.NETWORK:
            continue
        curves = [f"{op.name}/decode", f"{op.name}/prefill"] if op.kernel == "attention" else [op.name]
        for curve in curves:
            recorded.calls.clear()
            calls = made.calls(Load(curve, 12, 3))
            assert calls.sets == SETS  # all of them together are small
            for i in range(calls.sets):
                calls.call(i)
            assert [kernel for kernel, _, _ in recorded.calls] == [op.kernel] * SETS
            for _, _, options in recorded.calls:
                outputs = options["out"] if isinstance(options["out"], tuple) else (options["out"],)
                assert all(out.float().isfinite().all() for out in outputs)
                assert options["num_sms"] == 3
                assert options["plan"] == ("plan of 5 on 3" if op.kernel == "attention" else None)


def test_operations_of_a_ranks_shard_run_in_every_form() -> None:
    """On one of two ranks: half of the heads, and O cut by its columns or by its rows; collectives do not run here."""
    recorded, shape = Recorded(), SHAPES["llama"]
    graph = SearchRequest("llama", shape, 2, ()).operations
    options = {"page_tokens": 4, "precision": FLOAT32, "device": "cpu", "graph": graph, "ranks": 2}
    made = OperationInputs(shape, MIX, recorded.kernels, **options)
    for op in graph.operations:
        if op.resource is not Resource.NETWORK:
            made.calls(Load(f"{op.name}/decode" if op.kernel == "attention" else op.name, 12)).call(0)
    shapes = {kernel: [argument.shape for argument in arguments[:2]] for kernel, arguments, _ in recorded.calls}
    heads, width = shape.num_heads // 2, shape.head_dim
    assert shapes["attention"][0][1] == heads * width
    assert shape.num_kv_heads // 2 in shapes["attention"][1]
    products = [tuple(arguments[1].shape) for kernel, arguments, _ in recorded.calls if kernel == "linear"]
    assert {(shape.hidden_size, heads * width), (shape.hidden_size // 2, 2 * heads * width)} < set(products)


def test_only_what_the_launch_before_wrote_is_the_same_in_every_set() -> None:
    recorded = Recorded()
    made = operands("llama", recorded)
    for name, same in {
        "qkv": {"attention_norm"},
        "rope_append": {"qkv", "positions", "slots", "page_table"},
        "attention": {"rope_append", "positions", "slots", "page_table"},
        "o": {"attention"},
        "mlp_norm": {"attention_reduce"},  # which is o's output; the residual is older
        "attention_norm": {"update"},
        "down": {"gate_up"},
    }.items():
        recorded.calls.clear()
        calls = made.calls(Load(name, 8))
        for i in range(2):
            calls.call(i)
        (_, one, _), (_, other, _) = recorded.calls
        operation = made.graph[name]
        values = [*operation.inputs, *operation.parameters]
        found = {v for v, a, b in zip(values, one, other, strict=True) if a.data_ptr() == b.data_ptr()}
        assert found == same, name


def test_tokens_go_to_all_experts() -> None:
    recorded = Recorded()
    made = operands("mixtral", recorded)
    for op in made.graph.operations:
        if op.kernel.startswith("grouped"):
            made.calls(Load(op.name, 200)).call(0)
            assert set(recorded.calls[-1][1][1].flatten().tolist()) == set(range(8))
    assert len(recorded.calls) == 2


def test_weights_have_the_values_of_dummies() -> None:
    recorded = Recorded()
    made = operands("llama", recorded)
    made.calls(Load("qkv", 8)).call(0)
    made.calls(Load("mlp_norm", 8)).call(0)
    weight, norm = recorded.calls[0][1][1], recorded.calls[1][1][2]
    assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert (norm == 1).all()


@pytest.mark.parametrize("name", ["llama in FP8", "static scales", "scales of blocks"])
def test_values_in_fp8_stand_for_those_of_dummies(name: str) -> None:
    """So a GPU draws the power of real rows and weights: e4m3 is filled up to its largest value."""
    recorded = Recorded()
    made = operands(name, recorded)
    made.calls(Load("qkv", 40)).call(0)
    (_, (x, x_scale, weight, weight_scale), _) = recorded.calls[0]
    assert x.dtype == weight.dtype == torch.float8_e4m3fn
    assert reference.dequantise(x, x_scale).std().item() == pytest.approx(1, rel=0.1)
    assert weight.float().std().item() > 100
    product = torch.empty(40, len(weight))
    reference.scaled_linear(x, x_scale, weight, weight_scale, out=product)
    assert product.std().item() == pytest.approx(0.02 * x.shape[1] ** 0.5, rel=0.1)


def test_pages_in_fp8_have_normal_keys() -> None:
    recorded = Recorded()
    made = operands("llama in FP8", recorded)
    made.calls(Load("attention/decode", 400)).call(0)
    (_, (_, pages, *_, kv_scales), _) = recorded.calls[0]
    assert pages.dtype == torch.float8_e4m3fn
    assert pages.float().std().item() == pytest.approx(1, rel=0.1)
    assert (kv_scales == 1).all()


def test_rows_lie_as_in_the_engines_buffers() -> None:
    recorded = Recorded()
    made = operands("llama in FP8", recorded)
    made.calls(Load("gate_up", 8)).call(0)
    (_, (x, x_scale, *_), options) = recorded.calls[0]
    assert x.stride() == (16, 1), "16 bytes"
    assert x_scale.stride() == (1, 1), "a vector"
    assert options["out"].stride() == (40, 1), "37 columns of 4 bytes, in sixteens"


def test_amounts_are_keys_and_pairs() -> None:
    recorded = Recorded()
    made = operands("llama", recorded, Mix(1, 1, 100.0, 32.0))
    made.calls(Load("attention/decode", 2050)).call(0)
    made.calls(Load("attention/prefill", 4096)).call(0)
    (_, decode, _), (_, prefill, _) = recorded.calls
    assert len(decode[2]) == 20
    assert (decode[2] + 1).sum().item() == pytest.approx(2050, abs=10)
    assert len(prefill[2]) == 128
    assert (prefill[2] + 1).sum().item() == pytest.approx(4096, rel=0.03)
    with pytest.raises(ProfileError, match="kqv: the model has no such operation"):
        made.calls(Load("kqv", 1))


# steady batches


@pytest.mark.parametrize("mix", [Mix(704, 1344, 1280, 512), Mix(1365.3, 682.7, 1024, 256), Mix(0, 300, 0, 512)])
def test_a_steady_batch_is_of_its_mix(mix: Mix) -> None:
    requests = requests_of(mix)
    batch = SteadyBatch.of(requests, 64)
    assert len(batch.positions) == len(batch.slots) == round(mix.tokens)
    decodes = round(mix.decode_tokens)
    assert all(new == 1 for _, new in requests[:decodes])
    seen = batch.positions.double() + 1
    if decodes:
        assert seen[:decodes].mean().item() == pytest.approx(mix.decode_context, rel=0.01)
        assert 0.49 < seen[:decodes].min() / mix.decode_context < 0.52
        assert 1.48 < seen[:decodes].max() / mix.decode_context < 1.51
    assert seen[decodes:].mean().item() == pytest.approx(mix.prefill_context, rel=0.02)


def test_pages_are_each_requests_own() -> None:
    requests = [(7, 1), (0, 9), (3, 1)]
    batch = SteadyBatch.of(requests, 4)
    assert batch.positions.tolist() == [7, *range(9), 3]
    assert batch.slots.tolist() == [0, *[1] * 9, 2]
    used = [page for row, n in zip(batch.page_table.tolist(), (2, 3, 1), strict=True) for page in row[:n]]
    assert sorted(used) == list(range(6))
    assert batch.num_pages == 6
    assert batch.page_table.tolist() == SteadyBatch.of(requests, 4).page_table.tolist()


def test_requests_are_never_empty() -> None:
    assert prompt_requests(1, 0.5) == [(0, 1)]
    assert prompt_requests(5, 100.0) == [(97, 5)]
    assert decode_requests(1, 0.4) == [(0, 1)]
