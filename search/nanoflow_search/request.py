"""Setting: the model, its ranks and the workloads that a search is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path

import msgspec

from nanoflow_backend.config.model_config import ModelConfig
from nanoflow_backend.config.precision import BFLOAT16, Dtype, Precision
from nanoflow_backend.graph.model import Model
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.schedule.file import fingerprint
from nanoflow_search.cost.batch_sizes import mix_of, natural_tokens, suitable
from nanoflow_search.cost.model import ModelSize, Workload
from nanoflow_search.cost.work import Mix
from nanoflow_search.profile.data import Profile


class Phase(StrEnum):
    """Of a search, in their order."""

    PROFILE = "profile"  # of the device
    PLANS = "plans"  # needs a solver, and no device
    TIMING = "timing"  # on the device


class Effort(msgspec.Struct, frozen=True, kw_only=True):
    """How much is tried."""

    plans: int = 4  # of each size that are timed
    turns: int = 4  # of the two stages, for each number of parts
    time_limit_s: float = 60.0  # of each program
    shared: bool = False  # lanes that share SMs are profiled too, and planned for
    rounds: int = 5  # of timing: in each, a plan runs twice, and sequential before and after


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What the files of a search are the answer to."""

    model_fingerprint: str
    precision: Precision
    num_layers: int
    device: str
    device_sms: int
    tensor_parallel: int
    profile_hash: str
    workloads: tuple[str, ...]
    dense_batch_tokens: tuple[int, ...]
    effort: Effort


@dataclass(frozen=True)
class Setting:
    """`workloads` as in "1024/512"."""

    name: str  # of the model's folder
    config: ModelConfig
    ranks: int
    workloads: tuple[str, ...]
    precision: Precision = BFLOAT16  # that the engine will run in

    @classmethod
    def of(cls, folder: Path, ranks: int, workloads: Sequence[str], dtype: Dtype = "bfloat16") -> Setting:
        """Raises: ConfigError; ValueError, a workload that cannot be read."""
        for workload in workloads:
            Workload.parse(workload)
        config, precision = read_model_config(folder), Precision.of(dtype)
        return cls(folder.resolve().name, config, ranks, tuple(dict.fromkeys(workloads)), precision)

    @cached_property
    def model(self) -> Model:
        model = build(self.config, self.ranks)
        if len(model.layers) > 1:
            raise ValueError(f"{self.name}: expected layers of one kind, got {len(model.layers)} kinds")
        return model

    @cached_property
    def size(self) -> ModelSize:
        return ModelSize.of(self.config, self.precision)

    @property
    def parsed(self) -> tuple[Workload, ...]:
        return tuple(map(Workload.parse, self.workloads))

    def sizes(self, device: str) -> tuple[int, ...]:
        """Of batches that are worth a plan. Raises: SearchError, the memory of the device is not known."""
        return suitable([natural_tokens(self.size, device, self.ranks, workload) for workload in self.parsed])

    def mix(self, workload: str, tokens: int, device: str) -> Mix:
        parsed = Workload.parse(workload)
        return mix_of(parsed, tokens, natural_tokens(self.size, device, self.ranks, parsed))

    def request(self, profile: Profile, sizes: Sequence[int], effort: Effort) -> Request:
        return Request(
            model_fingerprint=fingerprint(*self.model.layers),
            precision=self.precision,
            num_layers=self.model.num_layers,
            device=profile.header.device,
            device_sms=profile.header.device_sms,
            tensor_parallel=self.ranks,
            profile_hash=profile.hash(),
            workloads=self.workloads,
            dense_batch_tokens=tuple(sizes),
            effort=effort,
        )
