"""Some checkpoints store several tensors as one; `split` finds the tensors that the graphs name in them.

An architecture lists such tensors with the names of their parts, which are rows of it one after the other. Names have
{layer}; where those of the parts have {expert}, the tensor has a matrix of such rows for each expert. The scales of a
quantised weight are cut like its rows; one number is the scale of every part.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from nanoflow_backend.models.checkpoint import PartOf, TensorHeader, WeightsError
from nanoflow_backend.models.parameters import Wanted
from nanoflow_backend.models.quantization.tensor_names import INPUT_SCALE, WEIGHT_SCALE, WEIGHT_SCALE_INV
from nanoflow_backend.models.scales import ONE_NUMBER

SCALES = (WEIGHT_SCALE, WEIGHT_SCALE_INV, INPUT_SCALE)


def split(
    headers: Mapping[str, TensorHeader], wanted: Mapping[str, Wanted], fused: Mapping[str, Sequence[str]]
) -> dict[str, TensorHeader]:
    """`headers` with the parts of each of the `fused` tensors in its place. What is of no part stays, to be refused.

    Raises:
        WeightsError: the tensor has other rows than its parts have together, or one of them is here by itself too.
    """
    found = dict(headers)
    for pattern, names in _with_scales(fused):
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


def _with_scales(fused: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, list[str]]]:
    """The tensors, and the scales of those that are weights of modules."""
    for pattern, names in fused.items():
        yield pattern, list(names)
        for scale in SCALES if pattern.endswith(".weight") else ():
            yield pattern.removesuffix("weight") + scale, [name.removesuffix("weight") + scale for name in names]


def _parts(
    name: str, header: TensorHeader, names: Sequence[str], wanted: Mapping[str, Wanted]
) -> dict[str, TensorHeader]:
    """The parts of a stored tensor by name; none where the model has other parts.

    Raises: WeightsError, it has other rows.
    """
    of_experts = "{expert}" in names[0]
    count = header.shape[0] if of_experts and header.shape else 1
    if any(part.replace("{expert}", str(e)) not in wanted for e in range(count) for part in names):
        return {}
    sources = [wanted[part.replace("{expert}", "0")].source for part in names]
    if name.endswith(SCALES) and header.shape in ONE_NUMBER:
        return dict.fromkeys(names, header)
    expected = (*header.shape[:of_experts], sum(source.shape[0] for source in sources), *sources[0].shape[1:])
    if header.shape != expected and not (name.endswith(SCALES) and header.shape == (*expected, 1)):
        raise WeightsError(f"{header.path}: tensor {name}: expected shape {list(expected)}, got {list(header.shape)}")
    parts: dict[str, TensorHeader] = {}
    for number in range(count):
        first = 0
        for part, source in zip(names, sources, strict=True):
            shape = (source.shape[0], *header.shape[1 + of_experts :])
            where = PartOf((number,) if of_experts else (), first)
            parts[part.replace("{expert}", str(number))] = header._replace(shape=shape, part=where)
            first += source.shape[0]
    return parts
