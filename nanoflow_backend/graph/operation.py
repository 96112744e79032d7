"""A Graph is part of a model's forward pass as data: Operations on Values and Parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Resource(StrEnum):
    """What bounds an operation, and so the lane it prefers (paper section 3)."""

    COMPUTE = "compute"
    MEMORY = "memory"
    NETWORK = "network"


class Kind(StrEnum):
    """How a value relates to the tokens of a batch."""

    TOKENS = "tokens"  # one row a token: a nano-batch reads and writes its own rows
    PAGES = "pages"  # the KV pages: what one token appends, every later token of its request may read
    BATCH = "batch"  # the same for the whole batch, such as the page table


class ScaleOf(StrEnum):
    """What a parameter that holds scales is multiplied with. A scale is fp32."""

    WEIGHT = "weight"  # [rows], one each; or [rows / BLOCK, columns / BLOCK], one for each block
    INPUT = "input"  # [1]: static, of all that goes into the sources' products
    KV = "kv"  # [2]: of K and of V as the pages have them


@dataclass(frozen=True)
class Value:
    """A value that flows between operations: [T tokens, width], or state of its own shape."""

    name: str
    width: int = 1  # elements a token
    dtype: str = "activations"  # a role in Precision ("kv" is another), or "int32", "float32", "float8_e4m3fn"
    kind: Kind = Kind.TOKENS


@dataclass(frozen=True)
class Source:
    """A checkpoint tensor that becomes part of a parameter.

    `shard` is the dimension that tensor parallelism cuts (None: a copy on every rank); it holds `units` whole
    pieces (heads, for one) that are never cut, and that ranks share where there are fewer units than ranks.
    Of each unit, the first `paired` rows come as pairs (0, 1), (2, 3) ... and become the first and the second halves of
    these: 0, 2, ..., 1, 3, ...
    `once`: ranks add up what it is part of, so the first of them holds it and the others hold zeros.
    `tied_to` names a tensor of the same shape that is read where the checkpoint has none of this name, or an equal one.
    """

    tensor: str  # with {layer} where it has one
    shape: tuple[int, ...]  # in the checkpoint
    shard: int | None = None
    units: int = 0  # 0: single rows or columns
    paired: int = 0
    once: bool = False
    tied_to: str | None = None


@dataclass(frozen=True)
class Parameter:
    """A weight as one rank holds it: the ranks' shards of its sources, one after the other along dimension 0.

    With `interleave` n, n consecutive sources (of one shape) take turns, `run` rows of each: 0, 1, 0, 1, ..., 2, 3, 2,
    3. A quantised weight has the scales of its sources as a parameter of its own, which has the same sources.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...] = ()
    interleave: int = 1
    run: int = 1
    dtype: str = "weights"  # as in Value: a role in Precision, or a dtype by its own name
    constant: tuple[float, ...] | None = None  # computed from the config instead of read
    scale: ScaleOf | None = None  # None: the sources themselves are read


@dataclass(frozen=True)
class Operation:
    """One kernel call: `kernel(*inputs, *parameters, **attributes)` writes `outputs`.

    Of the values in `own_rows` a launch reads or writes only those of its rows that are this rank's share of them
    (`rank_rows` of the collectives): the others' rows hold nothing here.
    """

    name: str
    kernel: str
    resource: Resource
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    attributes: Mapping[str, int | float] = field(default_factory=dict)
    own_rows: tuple[str, ...] = ()


@dataclass(frozen=True)
class Graph:
    """Operations in a legal order, and the values between them.

    `inputs` come from outside. A layer's graph is applied again and again: output i is the next layer's input i
    (`carried`); its other inputs are the same for every layer.
    """

    operations: tuple[Operation, ...]
    values: Mapping[str, Value]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: tuple[Parameter, ...]

    def __getitem__(self, name: str) -> Operation:
        return next(op for op in self.operations if op.name == name)

    def __contains__(self, name: str) -> bool:
        return any(op.name == name for op in self.operations)

    @property
    def carried(self) -> dict[str, str]:
        """Layer input -> the output of the layer before that becomes it."""
        return dict(zip(self.inputs, self.outputs, strict=False))
