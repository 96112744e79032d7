"""The forms of all-reduces: what the rewritten graphs hold, and which forms a graph cannot have."""

import pytest
from support.models.shapes import WITH_NORMS, config

from nanoflow_backend.config.quantization import Quantization
from nanoflow_backend.graph.builder import GraphBuilder
from nanoflow_backend.graph.collectives import (
    AllReduceForm,
    catalogue,
    in_forms,
    is_partial,
    model_in_forms,
    with_parameters,
)
from nanoflow_backend.graph.operation import Graph, Resource, Source
from nanoflow_backend.models.model import build

SPLIT, GATHERED, NORMED = AllReduceForm
BOTH = ("attention_reduce", "mlp_reduce")


def is_legal(graph: Graph) -> bool:
    written = set(graph.inputs)
    for op in graph.operations:
        if not set(op.inputs) <= written or not set(op.parameters) <= {p.name for p in graph.parameters}:
            return False
        written |= set(op.outputs)
    return set(graph.outputs) <= written <= set(graph.values)


@pytest.mark.parametrize("name", WITH_NORMS)
@pytest.mark.parametrize("tp", [2, 4, 8])
def test_every_form_is_a_legal_graph_with_the_same_products(name: str, tp: int) -> None:
    model = build(config(name), tp)
    for forms in (
        dict.fromkeys(BOTH, SPLIT),
        {"attention_reduce": GATHERED, "mlp_reduce": SPLIT},
        dict.fromkeys(BOTH, NORMED),
    ):
        graph = model_in_forms(model, forms, tp).layer
        assert is_legal(graph)
        products = [op.name.removesuffix(".columns") for op in graph.operations if op.resource is Resource.COMPUTE]
        assert products == [op.name for op in model.layer.operations if op.resource is Resource.COMPUTE]
        assert not {op.name for op in graph.operations} & forms.keys()


def test_a_split_all_reduce_keeps_its_output() -> None:
    layer = build(config("llama"), 2).layer
    split = in_forms(layer, {"mlp_reduce": SPLIT}, 2)
    assert [op.name for op in split.operations[-2:]] == ["mlp_reduce.reduce_scatter", "mlp_reduce.all_gather"]
    assert split.outputs == layer.outputs
    assert split.values["mlp_reduce.part"].width == 8
    assert [op.kernel for op in split.operations if "mlp_reduce" in op.outputs] == ["all_gather_columns"]


def test_a_gathered_product_has_a_ranks_rows_of_the_weight() -> None:
    layer = build(config("llama"), 2).layer
    gathered = in_forms(layer, {"attention_reduce": GATHERED}, 2)
    names = [op.name for op in gathered.operations]
    at = names.index("attention")
    assert names[at : at + 4] == [
        "attention",
        "attention_reduce.gather_input",
        "o.columns",
        "attention_reduce.all_gather",
    ]
    shapes = {p.name: (p.shape, p.sources[0].shard) for p in gathered.parameters if p.name.startswith("o.")}
    assert shapes == {"o.columns.weight": ((8, 32), 0)}, "in the place of (16, 16), cut by columns"
    assert (gathered.values["attention.gathered"].width, gathered.values["o.columns"].width) == (32, 8)
    assert gathered.outputs == layer.outputs


def test_a_quantised_product_gathers_before_it_quantises() -> None:
    """So that the scale of a row is that of the whole row, as on one rank."""
    shape = config("llama", hidden_size=256, head_dim=64, quantization=Quantization(method="fp8"))
    layer = build(shape, 2).layer
    gathered = in_forms(layer, {"attention_reduce": GATHERED}, 2)
    quantise = gathered["attention_quantise.gathered"]
    assert quantise.inputs == ("attention.gathered",)
    assert [gathered.values[name].width for name in quantise.outputs] == [512, 1]
    assert gathered["o.columns"].inputs == quantise.outputs
    assert {p.name: p.shape for p in gathered.parameters if p.name.startswith("o.")} == {
        "o.columns.weight": (128, 512),
        "o.columns.weight.scale": (128,),
    }
    in_blocks = Quantization(method="fp8", weights="block", activations="group")
    shape = config("llama", hidden_size=256, head_dim=128, intermediate_size=512, quantization=in_blocks)
    blocks = in_forms(build(shape, 2).layer, {"attention_reduce": GATHERED}, 2)
    assert blocks.values["attention.scale.gathered"].width == 1024 // 128
    assert {p.name: p.shape for p in blocks.parameters if p.name.startswith("o.")} == {
        "o.columns.weight": (128, 1024),
        "o.columns.weight.scale": (1, 8),
    }
    with pytest.raises(ValueError, match=r"o\.weight\.scale: 4 ranks would cut its blocks of 128"):
        in_forms(build(shape, 4).layer, {"attention_reduce": GATHERED}, 4)


def test_a_normed_all_reduce_takes_its_norm_over() -> None:
    layer = build(config("llama"), 4).layer
    normed = in_forms(layer, dict.fromkeys(BOTH, NORMED), 4)
    assert [op.name for op in normed.operations] == [
        *("mlp_reduce.normed", "qkv", "rope_append", "attention", "o"),
        *("attention_reduce.normed", "gate_up", "down"),
    ]
    first, second = normed["mlp_reduce.normed"], normed["attention_reduce.normed"]
    assert first.inputs == ("residual", "update")
    assert (first.parameters, second.parameters) == (("input_layernorm.weight",), ("post_attention_layernorm.weight",))
    assert second.inputs == ("attention_norm.residual", "o")
    assert first.own_rows == ("residual", "attention_norm.residual")
    assert second.own_rows == ("attention_norm.residual", "mlp_norm.residual")
    assert normed.outputs == ("mlp_norm.residual", "down")
    assert {op.kernel for op in (first, second)} == {"reduce_scatter_add_rms_norm_all_gather"}
    assert is_partial(dict.fromkeys(BOTH, NORMED))
    assert not is_partial({"mlp_reduce": SPLIT})


def test_a_normed_all_reduce_leaves_quantising_to_an_operation_of_its_own() -> None:
    layer = build(config("llama", quantization=Quantization(method="fp8")), 2).layer
    assert layer["mlp_norm"].kernel == "add_rms_norm_quantise"
    normed = in_forms(layer, dict.fromkeys(BOTH, NORMED), 2)
    assert is_legal(normed)
    quantise = normed["mlp_norm_quantise"]
    assert (quantise.kernel, quantise.inputs, quantise.outputs) == (
        "quantise",
        ("mlp_norm",),
        ("mlp_norm.fp8", "mlp_norm.scale"),
    )
    assert quantise.attributes.keys() == {"group", "upper_bound"}
    assert normed["attention_reduce.normed"].attributes.keys() == {"eps"}


def test_what_plans_need_is_loaded() -> None:
    model = build(config("llama"), 2)
    gathered = {"attention_reduce": GATHERED}
    for all_forms, names in (
        ([{}], {"o.weight"}),
        ([gathered], {"o.columns.weight"}),
        ([{}, gathered, dict.fromkeys(BOTH, NORMED)], {"o.weight", "o.columns.weight"}),
    ):
        parameters = {p.name for p in with_parameters(model, all_forms, 2).layer.parameters}
        assert {name for name in parameters if name.startswith("o.")} == names
        assert len(parameters - names) == len(model.layer.parameters) - 1


def test_the_catalogue_has_every_operation_of_every_form_once() -> None:
    layer, forms = build(config("llama"), 2).layer, [{}, {"attention_reduce": GATHERED}, dict.fromkeys(BOTH, NORMED)]
    found = catalogue(layer, forms, 2)
    names = [op.name for op in found.operations]
    assert sorted(names) == sorted({op.name for f in forms for op in in_forms(layer, f, 2).operations})
    for f in forms:
        graph = in_forms(layer, f, 2)
        for op in graph.operations:
            same = found[op.name]
            assert (same.kernel, same.parameters) == (op.kernel, op.parameters)
            assert [found.values[v].width for v in same.inputs] == [graph.values[v].width for v in op.inputs]


def test_forms_that_a_graph_cannot_have_are_refused() -> None:
    model = build(config("llama"), 2)
    for name, forms, tp, message in (
        ("llama", {"qkv": SPLIT}, 2, r"not an all-reduce: qkv; the graph has \['attention_reduce', 'mlp_reduce'\]"),
        ("llama", {"mlp_reduce": SPLIT}, 3, "mlp_reduce: width 16 is not a multiple of 3 ranks"),
        ("llama", {"mlp_reduce": GATHERED}, 2, "mlp_reduce: ranks pad the 37 columns of down.weight"),
        (
            "mixtral",
            {"mlp_reduce": GATHERED},
            2,
            "mlp_reduce: expected a product of one matrix before it",
        ),
        ("llama", {"mlp_reduce": NORMED}, 2, r"normed: expected all of \['attention_reduce', 'mlp_reduce'\] in it"),
        ("llama", dict.fromkeys(BOTH, NORMED), 1, "normed: expected several ranks, got 1"),
    ):
        layer = build(config(name), 2).layer if tp == 2 else model.layer
        with pytest.raises(ValueError, match=message):
            in_forms(layer, forms, tp)
    with pytest.raises(ValueError, match="not an all-reduce: qkv"):
        model_in_forms(model, {"qkv": SPLIT}, 2)
    g = GraphBuilder(2)
    x = g.linear("o", g.input("x", 8), g.weight("w", Source("w", (16, 16), shard=1)))
    alone = g.build(g.all_reduce("reduce", x))
    with pytest.raises(ValueError, match=r"reduce: expected one norm after it, got \['o'\]"):
        in_forms(alone, {"reduce": NORMED}, 2)
