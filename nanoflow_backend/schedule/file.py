"""ScheduleFile: the plans of a model on a machine, with a header that says where they came from."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from nanoflow_backend.config import ConfigError, read_file
from nanoflow_backend.graph.operation import Graph
from nanoflow_backend.schedule.plan import Schedule, ScheduleError

FORMAT_VERSION = 1


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the plans were made for, and what they promise. Times are of one layer; None: not known."""

    format_version: int = FORMAT_VERSION
    model_fingerprint: str
    device: str  # "NVIDIA H200", "cpu"
    device_sms: int | None = None
    tensor_parallel: int
    profile_hash: str | None = None
    solver: str | None = None
    gap: float | None = None  # the solver's, relative
    predicted_us: float | None = None
    measured_us: float | None = None


class ScheduleFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Plans for several batch sizes, smallest first."""

    header: Header
    plans: tuple[Schedule, ...]

    def __post_init__(self) -> None:
        sizes = [plan.tokens for plan in self.plans]
        if not sizes or sizes != sorted(set(sizes)):
            raise ScheduleError(f"plans: expected at least one, by ascending and different tokens; got {sizes}")

    @classmethod
    def load(cls, path: Path) -> ScheduleFile:
        """Raises: ScheduleError, naming the file and the place in it."""
        try:
            content = read_file(path)
            version = msgspec.json.decode(content, type=_Versioned).header.format_version
            if version != FORMAT_VERSION:  # before keys that another version may have
                raise ScheduleError(f"{path}: format version {version}, this engine reads {FORMAT_VERSION}")
            return msgspec.json.decode(content, type=cls)
        except ConfigError as error:
            raise ScheduleError(str(error)) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ScheduleError(f"{path}: {error.__cause__ or error}") from None

    def save(self, path: Path) -> None:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")

    def check_header(self, graph: Graph, device: str, tensor_parallel: int, device_sms: int | None = None) -> None:
        """Raises: ScheduleError, saying every way in which this machine differs from the one the plans are for."""
        here = Header(
            model_fingerprint=fingerprint(graph),
            device=device,
            device_sms=device_sms,
            tensor_parallel=tensor_parallel,
        )
        keys = ("model_fingerprint", "device", "device_sms", "tensor_parallel")
        differences = [
            f"{key} is {getattr(self.header, key)!r} in the file and {getattr(here, key)!r} here"
            for key in keys
            if getattr(self.header, key) != getattr(here, key)
        ]
        if differences:
            raise ScheduleError("the schedule was made for something else: " + "; ".join(differences))

    def plan_for(self, tokens: int) -> Schedule:
        """The smallest plan that holds `tokens`.

        Raises:
            ScheduleError: no plan does.
        """
        for plan in self.plans:
            if plan.tokens >= tokens:
                return plan
        raise ScheduleError(f"the largest plan is for {self.plans[-1].tokens} tokens, a batch may have {tokens}")


class _Version(msgspec.Struct):
    format_version: int


class _Versioned(msgspec.Struct):
    header: _Version


def fingerprint(graph: Graph) -> str:
    """16 hex digits that change with a layer's operations, widths or parameter shapes."""
    described = [(op.name, op.kernel, op.inputs, op.outputs, op.parameters) for op in graph.operations]
    widths = sorted((value.name, value.width, value.dtype) for value in graph.values.values())
    shapes = [(parameter.name, parameter.shape) for parameter in graph.parameters]
    return hashlib.sha256(repr((described, widths, shapes)).encode()).hexdigest()[:16]
