"""Hypothesis strategies for anything that a client may send are made from the declared tensors and sampling fields.

A new tensor or field is covered by being declared. Half of the cases are plausible: right types, common values, so that
many of them run. In the others anything may be wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import msgspec
import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from nanoflow_backend.request.sampling_params import NEUTRAL_VALUES, SamplingParams
from nanoflow_backend.serving.tensors import INPUTS, OUTPUTS, Tensor

PROMPTS = ("text_input", "prompts", "input_ids", "messages")
OF_MESSAGES = ("tools", "add_generation_prompt", "chat_template_kwargs")
RARELY_RIGHT = ("cancel", "input_lengths")  # beside anything else; with any but the right numbers
HINTS = get_type_hints(SamplingParams)
EDGES = (0, 16, 2**31, 2**32, 2**63, 2**64, -(2**31), -(2**63))
INTEGER_LIMITS = [edge + step for edge in EDGES for step in (-1, 0, 1)]
INTEGERS = st.integers(-3, 40) | st.sampled_from(INTEGER_LIMITS) | st.integers()
FLOATS = st.floats(0, 2) | st.floats()
TEXTS = st.text(max_size=12) | st.sampled_from(["the", " ", "\0", "\ud800", "é", "5", "true", "a " * 3000])
JSON = st.recursive(
    st.none() | st.booleans() | INTEGERS | FLOATS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
BESIDE_SAMPLING = ("priority", "timeout", "queue_timeout", "id")
NAMES = st.sampled_from([*HINTS, *NEUTRAL_VALUES, *BESIDE_SAMPLING]) | st.text(max_size=8)
PLAUSIBLE = {int: st.integers(0, 20), float: st.floats(0.1, 1), str: st.text("the quick", min_size=1, max_size=4)}
ANYTHING = {int: INTEGERS, float: FLOATS, str: TEXTS}


class FuzzRequest(NamedTuple):
    """A request: tensors by name (strings are objects: bytes), parameters, its timeout and the outputs it names."""

    tensors: dict[str, NDArray[Any]]
    parameters: dict[str, Any]
    timeout_us: int
    outputs: list[str]


@st.composite
def cases(draw: st.DrawFn, shapes_are_declared: bool = True) -> FuzzRequest:
    """A request. With declared shapes it is one that the server lets through to the model."""
    plausible = draw(st.booleans())
    wrong = [] if plausible else [(), ("cancel",), PROMPTS]
    right = [("text_input",)] * 5 + [("input_ids",)] * 2 + [("prompts",)] * 2 + [("messages",)]
    prompts = draw(st.sampled_from(right + wrong))
    unfit = (*PROMPTS, *RARELY_RIGHT, *(() if prompts == ("messages",) else OF_MESSAGES)) if plausible else PROMPTS
    optional = [tensor.name for tensor in INPUTS if tensor.name not in unfit]
    names = [*prompts, *draw(st.lists(st.sampled_from(optional), max_size=4, unique=True))]
    return FuzzRequest(
        tensors={t.name: draw(arrays(t, plausible, shapes_are_declared)) for t in INPUTS if t.name in names},
        parameters=draw(sampling(plausible)),
        timeout_us=draw(st.sampled_from([0] * 6 + [1, 10_000, 10_000_000])),
        outputs=draw(st.just([]) | st.lists(st.sampled_from([t.name for t in OUTPUTS]), unique=True)),
    )


@st.composite
def sampling(draw: st.DrawFn, plausible: bool = False) -> dict[str, Any]:
    """Sampling fields of the right type; or names of any kind with values of any."""
    if plausible:
        names = draw(st.lists(st.sampled_from(list(HINTS)), max_size=2, unique=True))
        return {name: draw(of_type(HINTS[name], PLAUSIBLE)) for name in names}
    return {name: draw(values(name)) for name in draw(st.lists(NAMES, max_size=4, unique=True))}


def values(name: str) -> st.SearchStrategy[Any]:
    """Of the field's type where there is one; the same spelled as a string; or anything."""
    plain = [st.sampled_from(NEUTRAL_VALUES[name])] if name in NEUTRAL_VALUES else []
    typed = of_type(HINTS[name], ANYTHING) if name in HINTS else INTEGERS
    return st.one_of(*plain, typed, typed, typed.map(str), JSON)


def of_type(hint: Any, scalars: dict[Any, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    """Values of a type hint as JSON has them: a tuple is a list."""
    arguments = [of_type(part, scalars) for part in get_args(hint) if part is not Ellipsis]
    match get_origin(hint) or hint:
        case kind if kind in scalars:
            return scalars[kind]
        case kind if kind in (UnionType, Union):
            return st.one_of(*arguments)
        case kind if kind in (tuple, list):
            return st.lists(arguments[0], max_size=3)
        case kind if isinstance(kind, type) and issubclass(kind, Mapping):
            return st.dictionaries(*arguments, max_size=3)
        case kind if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            fields = {name: of_type(field, scalars) for name, field in get_type_hints(kind).items()}
            return st.fixed_dictionaries({}, optional=fields)
        case kind if kind in (Any, object):
            return JSON
    return st.from_type(hint)


@st.composite
def arrays(draw: st.DrawFn, tensor: Tensor, plausible: bool, shapes_are_declared: bool) -> NDArray[Any]:
    """A tensor of the declared type; without declared shapes it may have any."""
    shape = tuple(draw(st.integers(1, 4)) if size < 0 else size for size in tensor.dims)
    if not plausible and not shapes_are_declared and draw(st.integers(0, 9)) == 0:
        shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    count = int(np.prod(shape))
    array = np.empty(count, DTYPES[tensor.type])
    array[:] = draw(st.lists(elements(tensor, plausible), min_size=count, max_size=count))
    return array.reshape(shape)


def elements(tensor: Tensor, plausible: bool) -> st.SearchStrategy[Any]:
    if plausible:
        if tensor.name in PLAUSIBLE_JSON:
            return PLAUSIBLE_JSON[tensor.name].map(encoded)
        return {**ELEMENTS, "STRING": PLAUSIBLE[str].map(str.encode), "INT32": st.integers(0, 300)}[tensor.type]
    return ELEMENTS[tensor.type]


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


# Inputs that are JSON: what is in them cannot be told from the table.
PLAUSIBLE_JSON = {
    "sampling_parameters": sampling(plausible=True),
    "messages": st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": TEXTS}), min_size=1, max_size=3),
    "tools": st.lists(st.dictionaries(TEXTS, JSON, max_size=2), max_size=2),
    "chat_template_kwargs": st.dictionaries(TEXTS, JSON, max_size=2),
}
DTYPES = {"BOOL": np.bool_, "INT32": np.int32, "FP32": np.float32, "STRING": np.object_}
ELEMENTS: dict[str, st.SearchStrategy[Any]] = {
    "BOOL": st.booleans(),
    "INT32": st.integers(0, 300) | st.integers(-(2**31), 2**31 - 1),
    "FP32": st.floats(width=32),
    "STRING": st.one_of(
        TEXTS.map(lambda text: text.encode(errors="replace")),
        st.binary(max_size=8),
        sampling().map(encoded),
        sampling(plausible=True).map(encoded),
        JSON.map(encoded),
    ),
}
