"""A model's parameters by full name, what checkpoint tensors they are made of, and whether a checkpoint has those."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from nanoflow_backend.config.model_config import ModelConfig
from nanoflow_backend.config.quantization import FP8, Quantization
from nanoflow_backend.graph.model import Model
from nanoflow_backend.graph.operation import Graph, Parameter, ScaleOf, Source
from nanoflow_backend.models import checkpoint
from nanoflow_backend.models.checkpoint import INDEX, TensorHeader, WeightsError
from nanoflow_backend.models.quantization.tensor_names import KV_SCALES, WEIGHT_SCALE, loaders_names
from nanoflow_backend.models.scales import scale_sources, stored_shapes

FLOATS, E4M3 = ("F32", "F16", "BF16"), "F8_E4M3"  # dtypes as safetensors spells them
UNUSED = {  # tensors that some checkpoints have and no model reads, and why
    r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.(original_)?inv_freq": "rotary frequencies follow from config.json",
    r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.(cos|sin)_cached": "rotary tables follow from config.json",
    rf"model\.layers\.\d+\.self_attn\.({'|'.join(KV_SCALES)})": "pages of this run have no scales",
}

log = logging.getLogger(__name__)


class Parameters(NamedTuple):
    """All parameters by full name; and, apart, those that are another one under a second name (tied embeddings)."""

    own: dict[str, Parameter]
    aliases: dict[str, str]


class Wanted(NamedTuple):
    """A checkpoint tensor that a model can be made of, and a parameter that it is for."""

    source: Source
    parameter: Parameter


def named_parameters(
    model: Model, quantization: Quantization | None = None, stand_ins: Mapping[str, str] | None = None
) -> Parameters:
    """What is allocated. Sources are those that are read: scale tensors, in the place of the weights they are of.

    `stand_ins` are the tensors that are read in the place of others; by default every tied one has a stand-in.
    """
    parameters = Parameters({}, {})
    by_content: dict[object, str] = {}
    for name, parameter in _with_full_names(model, quantization):
        sources = tuple(
            replace(source, tensor=source.tied_to or source.tensor, tied_to=None)
            if stand_ins is None
            else replace(source, tensor=stand_ins.get(source.tensor, source.tensor), tied_to=None)
            for source in parameter.sources
        )
        content: object = (parameter.shape, tuple(s.tensor for s in sources), parameter.interleave, parameter.constant)
        if not sources and parameter.constant is None:
            content = name  # made while others are read
        if content in by_content:
            parameters.aliases[name] = by_content[content]
        else:
            by_content[content] = name
            parameters.own[name] = replace(parameter, sources=sources)
    return parameters


def wanted_tensors(model: Model, quantization: Quantization | None) -> dict[str, Wanted]:
    """The checkpoint tensors that the model can be made of, by the loader's name: of two that are tied, both."""
    named = {
        source.tensor: Wanted(source, parameter)
        for _, parameter in _with_full_names(model, quantization)
        for source in parameter.sources
    }
    tied = [wanted for wanted in named.values() if wanted.source.tied_to]
    return named | {
        w.source.tied_to: w._replace(source=replace(w.source, tied_to=None))
        for w in tied
        if w.source.tied_to and w.source.tied_to not in named
    }


def find_stand_ins(headers: Mapping[str, TensorHeader], wanted: Mapping[str, Wanted]) -> dict[str, str]:
    """Which tensor is read in the place of a tied one: the one of the two that the checkpoint has, or that is equal."""
    stand_ins = {}
    for name, twin in _tied(wanted).items():
        if twin not in headers:
            stand_ins[twin] = name
        elif name not in headers or checkpoint.equal(headers[name].path, name, headers[twin].path, twin):
            stand_ins[name] = twin
        else:
            log.warning(
                "%s: tensor %s differs from %s, to which config.json ties it (tie_word_embeddings): both are kept. "
                "Set tie_word_embeddings to false to load them without this warning.",
                headers[name].path, name, twin,
            )  # fmt: skip
    return stand_ins


def by_loaders_names(headers: Iterable[TensorHeader], quantization: Quantization | None) -> dict[str, TensorHeader]:
    """The tensors of a checkpoint by the names that the loader has for them.

    Raises:
        WeightsError: two tensors are the same thing under two names.
    """
    weight_scale = WEIGHT_SCALE if quantization is None else quantization.weight_scale
    named: dict[str, TensorHeader] = {}
    for header in headers:
        for name in loaders_names(header.name, weight_scale):
            if name in named:
                both = f"{named[name].name} and {header.name}"
                raise WeightsError(f"{header.path}: tensors {both} are one thing under two names: expected one of them")
            named[name] = header
    return named


def check(
    headers: Mapping[str, TensorHeader], wanted: Mapping[str, Wanted], config: ModelConfig, files: Iterable[Path]
) -> None:
    """Compare the tensors of a checkpoint, by the loader's names, with those that the model is made of.

    Raises:
        WeightsError: a tensor that is missing, unknown, mis-shaped, or of a dtype that it should not have.
    """
    for name, header in headers.items():
        if name in wanted:
            _check_header(header, *wanted[name], config.quantization)
        elif not any(re.fullmatch(pattern, name) for pattern in UNUSED):
            raise WeightsError(f"{header.path}: tensor {header.name} is not part of this {config.architecture} model")
    tied = _tied(wanted)
    enough = headers.keys() | {a for pair in tied.items() for a in pair if headers.keys() & set(pair)}
    missing = wanted.keys() - tied.keys() - enough
    kv_scales = {name for name, (_, parameter) in wanted.items() if parameter.scale is ScaleOf.KV}
    if kv_scales <= missing:  # a checkpoint need not have them
        missing -= kv_scales
    if missing:
        path, *others = files
        where = path.parent / INDEX if others else path
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise WeightsError(f"{where}: tensor {min(missing)} is missing{more}")


def _check_header(
    header: TensorHeader, source: Source, parameter: Parameter, quantization: Quantization | None
) -> None:
    tensor = f"{header.path}: tensor {header.name}"
    is_fp8 = parameter.dtype == FP8 and not (quantization is not None and quantization.at_load)
    if header.shape not in (shapes := stored_shapes(parameter, source, quantization)):
        expected = " or ".join(str(list(shape)) for shape in shapes)
        why = f", {_explained(parameter, quantization)}" if parameter.scale else ""
        raise WeightsError(f"{tensor}: expected shape {expected}{why}, got {list(header.shape)}")
    if is_fp8 and header.dtype != E4M3:
        raise WeightsError(
            f"{tensor}: expected dtype {E4M3}, for quantization_config does not say that this stays as it is, "
            f"got {header.dtype}"
        )
    if not is_fp8 and header.dtype not in FLOATS:
        hint = ""
        if header.dtype.startswith("F8") and parameter.scale is None:
            hint = " (embeddings, lm_head, norms and routers, and what quantization_config leaves out, are not in FP8)"
        raise WeightsError(f"{tensor}: expected dtype {', '.join(FLOATS)}{hint}, got {header.dtype}")


def _explained(parameter: Parameter, quantization: Quantization | None) -> str:
    if parameter.scale is ScaleOf.WEIGHT and quantization is not None:
        return f"a scale a {quantization.weights}"
    return "one scale a layer" if parameter.scale is ScaleOf.KV else "one scale"


def _with_full_names(model: Model, quantization: Quantization | None) -> Iterable[tuple[str, Parameter]]:
    """Every parameter of every layer, with the layer in its name and in those of its sources."""
    for layer, graph in _graphs(model):
        for parameter in graph.parameters:
            name = f"layers.{layer}.{parameter.name}" if layer else parameter.name
            sources = tuple(replace(s, tensor=s.tensor.replace("{layer}", layer)) for s in parameter.sources)
            full = replace(parameter, name=name, sources=sources)
            yield name, replace(full, sources=scale_sources(full, quantization))


def _graphs(model: Model) -> list[tuple[str, Graph]]:
    """The graphs that have parameters, in order, each with the number of its layer ("" where it is none)."""
    return [("", model.embed), *((str(i), graph) for i, graph in enumerate(model.in_order)), ("", model.head)]


def _tied(wanted: Mapping[str, Wanted]) -> dict[str, str]:
    return {name: source.tied_to for name, (source, _) in wanted.items() if source.tied_to is not None}
