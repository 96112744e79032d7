"""ScheduleFile holds the plans of a model on a machine, with a header that says where they came from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.file import read_file
from nanoflow_backend.config.precision import Precision
from nanoflow_backend.graph.model import Model
from nanoflow_backend.graph.operation import Graph
from nanoflow_backend.schedule.plan import Schedule, ScheduleError

FORMAT_VERSION = 3  # 3: precision
MOST_FILE_BYTES = 16 * 2**20  # what the search has written so far has some 12 kB
MOST_PLANS = 32  # each is validated, bound to buffers and captured

Count = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Measure = Annotated[float, msgspec.Meta(ge=0)]


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the plans were made for, and what they promise. Times are of one layer at B_dense; None: not known."""

    format_version: int = FORMAT_VERSION
    model_fingerprint: str
    precision: Precision
    device: str  # "NVIDIA H200", "cpu"
    device_sms: Count | None = None
    tensor_parallel: Count
    dense_batch_tokens: Count  # B_dense: the size of a step that was found best
    workloads: tuple[str, ...] = ()  # "1024/512"
    profile_hash: str | None = None
    solver: str | None = None
    gap: Measure | None = None  # the solver's, relative
    predicted_us: Measure | None = None
    measured_us: Measure | None = None


class Trial(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A plan that a search predicted, and then timed against sequential: what `nanoflow-search explain` tells of."""

    plan: str  # "sequential", "plan 1"
    dense_batch_tokens: Count
    workload: str
    predicted_us: Measure  # of one layer, before it was timed
    measured_us: Measure
    gain: Measure  # over sequential; and the 95 % interval, whose low end may be below 0
    gain_low: float
    gain_high: float
    power_w: Measure
    clock_mhz: Measure
    token_mj: Measure  # of all layers
    chosen: bool


class ScheduleFile(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Plans by ascending `tokens`, and of the same tokens by descending `least_decode_kv_tokens`: a batch runs under
    the first that holds it.

    So a plan for small batches is for them alone; there, as a rule, sequential: parts of few tokens only cost. The
    last plan of each size asks for nothing, so that there is one for every batch.
    """

    header: Header
    plans: tuple[Schedule, ...]
    trials: tuple[Trial, ...] = ()
    bounds_us: dict[str, Measure] = {}  # by name, what no plan's layer at B_dense goes below

    def __post_init__(self) -> None:
        _check_order(self.plans)
        largest = self.plans[-1].tokens
        if not 1 <= self.header.dense_batch_tokens <= largest:
            raise ScheduleError(
                f"dense_batch_tokens: expected 1..{largest}, which plans reach, got {self.header.dense_batch_tokens}"
            )

    @classmethod
    def load(cls, path: Path) -> ScheduleFile:
        """Raises: ScheduleError, naming the file and the place in it."""
        try:
            content = read_file(path, MOST_FILE_BYTES)
            version = msgspec.json.decode(content, type=_Versioned).header.format_version
            if version != FORMAT_VERSION:  # before keys that another version may have
                raise ScheduleError(
                    f"{path}: format version {version}, this engine reads {FORMAT_VERSION}: "
                    'search again, with nanoflow-search or "schedule": "auto"'
                )
            return msgspec.json.decode(content, type=cls)
        except ConfigError as error:
            raise ScheduleError(str(error)) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ScheduleError(f"{path}: {error.__cause__ or error}") from None

    def save(self, path: Path) -> None:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")

    def check_header(
        self, model: Model, precision: Precision, device: str, tensor_parallel: int, device_sms: int | None = None
    ) -> None:
        """Raises: ScheduleError, saying every way in which this machine differs from the one the plans are for."""
        here = {
            "model_fingerprint": fingerprint(*model.layers),
            "precision": precision,
            "device": device,
            "device_sms": device_sms,
            "tensor_parallel": tensor_parallel,
        }
        differences = [
            f"{key} is {_said(getattr(self.header, key))} in the file and {_said(value)} here"
            for key, value in here.items()
            if getattr(self.header, key) != value
        ]
        if differences:
            raise ScheduleError("the schedule was made for something else: " + "; ".join(differences))

    def plans_up_to(self, tokens: int) -> tuple[Schedule, ...]:
        """Those that batches of up to `tokens` need, or all where none reaches so far."""
        reached = min((plan.tokens for plan in self.plans if plan.tokens >= tokens), default=tokens)
        return tuple(plan for plan in self.plans if plan.tokens <= reached)


def _check_order(plans: Sequence[Schedule]) -> None:
    if len(plans) > MOST_PLANS:
        raise ScheduleError(f"plans: expected at most {MOST_PLANS}, got {len(plans)}")
    order = [(plan.tokens, -plan.least_decode_kv_tokens) for plan in plans]
    if not order or order != sorted(set(order)):
        listed = ", ".join(f"{plan.tokens} ({plan.least_decode_kv_tokens})" for plan in plans)
        raise ScheduleError(
            f"plans: expected at least one, by ascending tokens, and those of the same tokens by descending and "
            f"different least_decode_kv_tokens; got {listed or 'none'}"
        )
    for tokens, last in {plan.tokens: plan for plan in plans}.items():
        if last.least_decode_kv_tokens:
            raise ScheduleError(
                f"plans: the last one for {tokens} tokens must be for every batch, with least_decode_kv_tokens 0; "
                f"it has {last.least_decode_kv_tokens}"
            )


class _Version(msgspec.Struct):
    format_version: int


class _Versioned(msgspec.Struct):
    header: _Version


def fingerprint(*layers: Graph) -> str:
    """16 hex digits that change with the operations, widths or parameter shapes of any kind of layer."""
    described = [
        (
            [(op.name, op.kernel, op.inputs, op.outputs, op.parameters) for op in graph.operations],
            sorted((value.name, value.width, value.dtype) for value in graph.values.values()),
            [(parameter.name, parameter.shape) for parameter in graph.parameters],
        )
        for graph in layers
    ]
    return hashlib.sha256(repr(described).encode()).hexdigest()[:16]


def _said(value: object) -> str:
    return str(value) if isinstance(value, Precision) else repr(value)
