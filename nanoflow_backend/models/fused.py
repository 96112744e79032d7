"""Some checkpoints store several tensors as one; `split` finds the tensors that the graphs name in them.

An architecture lists such tensors with the names of their parts, which are rows of it one after the other. Names have
{layer}; where those of the parts have {expert}, the tensor has a matrix of such rows for each expert.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from nanoflow_backend.models.checkpoint import PartOf, TensorHeader, WeightsError
from nanoflow_backend.models.parameters import Wanted


def split(
    headers: Mapping[str, TensorHeader], wanted: Mapping[str, Wanted], fused: Mapping[str, Sequence[str]]
) -> dict[str, TensorHeader]:
    """`headers` with the parts of each of the `fused` tensors in its place. What is of no part stays, to be refused.

    Raises:
        WeightsError: the tensor has another shape than its parts have together, or one of them is here by itself too.
    """
    found = dict(headers)
    for pattern, names in fused.items():
        regex = re.compile(re.escape(pattern).replace(r"\{layer\}", r"(\d+)"))
        for name, header in headers.items():
            match = regex.fullmatch(name)
            if match is None or name in wanted:
                continue
            parts = _parts(name, header, [part.replace("{layer}", match[1]) for part in names], wanted)
            if twice := sorted(parts.keys() & headers.keys()):
                raise WeightsError(f"{header.path}: tensor {name} is here, and so is {twice[0]}, which is a part of it")
            if parts:
                del found[name]
                found.update(parts)
    return found


def _parts(
    name: str, header: TensorHeader, names: Sequence[str], wanted: Mapping[str, Wanted]
) -> dict[str, TensorHeader]:
    """The parts of a stored tensor by name; none where the model has other parts.

    Raises: WeightsError, its shape is not that of the parts.
    """
    of_experts = "{expert}" in names[0]
    count = header.shape[0] if of_experts and header.shape else 1
    if any(part.replace("{expert}", str(e)) not in wanted for e in range(count) for part in names):
        return {}
    shapes = [wanted[part.replace("{expert}", "0")].source.shape for part in names]
    expected = (*header.shape[:of_experts], sum(rows for rows, *_ in shapes), *shapes[0][1:])
    if header.shape != expected:
        raise WeightsError(f"{header.path}: tensor {name}: expected shape {list(expected)}, got {list(header.shape)}")
    parts: dict[str, TensorHeader] = {}
    for number in range(count):
        first = 0
        for part, shape in zip(names, shapes, strict=True):
            where = PartOf((number,) if of_experts else (), first)
            parts[part.replace("{expert}", str(number))] = header._replace(shape=shape, part=where)
            first += shape[0]
    return parts
