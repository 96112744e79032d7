"""Anything that a client may send: hypothesis strategies made from the declared tensors and sampling fields.

A new tensor or field is covered by being declared. Values are of the declared type, at its limits, or of another one.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple, get_type_hints

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from nanoflow_backend.scheduler.sampling_params import NEUTRAL_VALUES, SamplingParams
from nanoflow_backend.serving.tensors import INPUTS, OUTPUTS, Tensor

PROMPTS = ("text_input", "input_ids")
HINTS = get_type_hints(SamplingParams)
INTEGER_LIMITS = [edge + step for edge in (0, 16, 2**31, 2**32, 2**63, 2**64, -(2**31), -(2**63)) for step in (-1, 0, 1)]
INTEGERS = st.integers(-3, 40) | st.sampled_from(INTEGER_LIMITS) | st.integers()
FLOATS = st.floats(0, 2) | st.floats()
TEXTS = st.text(max_size=12) | st.sampled_from(["the", " ", "\0", "\ud800", "é", "5", "true", "a " * 3000])
JSON = st.recursive(
    st.none() | st.booleans() | INTEGERS | FLOATS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from([*HINTS, *NEUTRAL_VALUES, "priority", "timeout", "id"]) | st.text(max_size=8)


class Case(NamedTuple):
    """A request: tensors by name (strings are objects: bytes), parameters, its timeout and the outputs it names."""

    tensors: dict[str, NDArray[Any]]
    parameters: dict[str, Any]
    timeout_us: int
    outputs: list[str]


@st.composite
def cases(draw: st.DrawFn, shapes_are_declared: bool = True) -> Case:
    """A request. With declared shapes it is one that the server lets through to the model."""
    prompts = draw(st.sampled_from([("text_input",)] * 6 + [("input_ids",)] * 3 + [(), PROMPTS]))
    optional = [tensor.name for tensor in INPUTS if tensor.name not in PROMPTS]
    names = [*prompts, *draw(st.lists(st.sampled_from(optional), max_size=5, unique=True))]
    return Case(
        tensors={t.name: draw(arrays(t, shapes_are_declared)) for t in INPUTS if t.name in names},
        parameters=draw(sampling()),
        timeout_us=draw(st.sampled_from([0] * 6 + [1, 10_000, 10_000_000])),
        outputs=draw(st.lists(st.sampled_from([t.name for t in OUTPUTS]), unique=True) | st.just([])),
    )


@st.composite
def sampling(draw: st.DrawFn) -> dict[str, Any]:
    """Names to values: mostly sampling fields of the right type."""
    return {name: draw(values(name)) for name in draw(st.lists(NAMES, max_size=4, unique=True))}


def values(name: str) -> st.SearchStrategy[Any]:
    """Of the field's type where there is one; the same spelled as a string; or anything."""
    plain = [st.sampled_from(NEUTRAL_VALUES[name])] if name in NEUTRAL_VALUES else []
    typed = [of_type(HINTS[name])] * 3 if name in HINTS else []
    return st.one_of(*plain, *typed, *[one.map(str) for one in typed[:1]], JSON)


def of_type(hint: Any) -> st.SearchStrategy[Any]:
    if hint is int:
        return INTEGERS
    if hint is float:
        return FLOATS
    if hint is str:
        return TEXTS
    if isinstance(hint, type) or getattr(hint, "__origin__", None) is None:
        parts = getattr(hint, "__args__", ())
        return st.one_of(*map(of_type, parts)) if parts else st.from_type(hint)
    return st.from_type(hint)


@st.composite
def arrays(draw: st.DrawFn, tensor: Tensor, shapes_are_declared: bool) -> NDArray[Any]:
    """A tensor of the declared type; without declared shapes it may have any."""
    shape = tuple(draw(st.integers(1, 4)) if size < 0 else size for size in tensor.dims)
    if not shapes_are_declared and draw(st.integers(0, 9)) == 0:
        shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    count = int(np.prod(shape))
    elements, dtype = ELEMENTS[tensor.type]
    array = np.empty(count, dtype)
    array[:] = draw(st.lists(elements, min_size=count, max_size=count))
    return array.reshape(shape)


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


ELEMENTS: dict[str, tuple[st.SearchStrategy[Any], Any]] = {
    "BOOL": (st.booleans(), np.bool_),
    "INT32": (st.integers(0, 300) | st.integers(-(2**31), 2**31 - 1), np.int32),
    "UINT32": (st.integers(0, 2**32 - 1), np.uint32),
    "INT64": (INTEGERS.filter(lambda i: -(2**63) <= i < 2**63), np.int64),
    "FP32": (st.floats(width=32), np.float32),
    "STRING": (
        st.one_of(
            TEXTS.map(lambda text: text.encode(errors="replace")),
            st.binary(max_size=8),
            sampling().map(encoded),
            JSON.map(encoded),
        ),
        np.object_,
    ),
}
