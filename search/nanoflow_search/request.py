"""The request says what a search is for: a model, its ranks and workloads, and how much effort is spent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path

import msgspec

from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.model_config import ModelConfig
from nanoflow_backend.config.precision import BFLOAT16, Precision
from nanoflow_backend.graph.collectives import AllReduceForm, Forms, catalogue, in_forms
from nanoflow_backend.graph.model import Model
from nanoflow_backend.graph.operation import Graph
from nanoflow_backend.models.computed import read_computed
from nanoflow_backend.models.model import build
from nanoflow_backend.schedule.file import fingerprint
from nanoflow_search.cost.batch_sizes import batch_mix, natural_tokens, suitable_sizes
from nanoflow_search.cost.model import ModelSize
from nanoflow_search.cost.workload import MeanWorkload, Mix
from nanoflow_search.profile.data import Profile


class Phase(StrEnum):
    """The phases of a search, in their order."""

    PROFILE = "profile"  # on the device
    PLANS = "plans"  # needs a solver, and no device
    TIMING = "timing"  # on the device


class Effort(msgspec.Struct, frozen=True, kw_only=True):
    """How much a search tries."""

    plans: int = 4  # plans of each size that are timed
    turns: int = 4  # runs of the two stages for each number of parts; 0: the grid alone, which needs no solver
    time_limit_s: float = 60.0  # for each program
    shared: bool = False  # lanes that share SMs are profiled and planned for, too
    rounds: int = 5  # rounds of timing: in each, a plan runs twice, and sequential before and after it


class SearchKey(msgspec.Struct, frozen=True, kw_only=True):
    """All that the files of a checkpoint depend on: files of another key are never used."""

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
class SearchRequest:
    """A model on a tensor-parallel group, and the workloads that its plans must be good for."""

    name: str  # of the model's folder
    config: ModelConfig
    ranks: int
    workloads: tuple[str, ...]  # such as "1024/512": mean tokens of prompts and outputs
    precision: Precision = BFLOAT16  # that the engine will run in

    @classmethod
    def of(cls, folder: Path, ranks: int, workloads: Sequence[str], **precision: str | None) -> SearchRequest:
        """Return the request for the model in `folder`, which holds a Hugging Face config.json.

        `precision` is dtype, quantization and kv_cache_dtype as in engine.json, for an engine on a GPU.

        Raises:
            ConfigError: the model cannot be read, or cannot be computed in such a precision.
            ValueError: a workload cannot be read.
        """
        for workload in workloads:
            MeanWorkload.parse(workload)
        asked = EngineConfig.resolve({"model": str(folder), **precision}, relative_to=Path.cwd(), origin="precision")
        engine, config = read_computed(asked, "cuda")
        names = tuple(dict.fromkeys(workloads))
        return cls(folder.resolve().name, config, ranks, names, engine.precision_on("cuda"))

    @cached_property
    def model(self) -> Model:
        """The op graphs of one rank.

        Raises:
            ValueError: the layers are of several kinds, whose operations differ in more than their weights.
        """
        model = build(self.config, self.ranks)
        if any(graph.operations != model.layers[0].operations for graph in model.layers):
            raise ValueError(f"{self.name}: expected layers of one kind, got {len(model.layers)} kinds")
        return model

    @cached_property
    def forms(self) -> tuple[Forms, ...]:
        """The forms that a layer's all-reduces may have on these ranks: whole first; on one rank there is no other."""
        if self.ranks == 1:
            return ({},)
        layer = self.model.layer
        names = [op.name for op in layer.operations if op.kernel == "all_reduce"]
        found: list[Forms] = [{}]
        for form, of in (
            (AllReduceForm.SPLIT, names),
            (AllReduceForm.GATHERED, names[:1]),  # of the product after attention: others would gather wider rows
            (AllReduceForm.NORMED, names),
        ):
            forms = dict.fromkeys(of, form)
            try:
                in_forms(layer, forms, self.ranks)
            except ValueError:  # such as of columns that the ranks cannot share
                continue
            found.append(forms)
        return tuple(found)

    @cached_property
    def operations(self) -> Graph:
        """All operations that a layer has in any of the forms: what a profile is to hold."""
        return catalogue(self.model.layer, self.forms, self.ranks)

    @cached_property
    def size(self) -> ModelSize:
        """The sizes that the cost model needs."""
        return ModelSize.of(self.config, self.precision)

    @property
    def parsed(self) -> tuple[MeanWorkload, ...]:
        """The workloads as numbers."""
        return tuple(map(MeanWorkload.parse, self.workloads))

    def sizes(self, device: str) -> tuple[int, ...]:
        """Return the batch sizes that are worth a plan on a device, ascending, in tokens.

        Raises:
            SearchError: the memory of the device is not known.
        """
        return suitable_sizes([natural_tokens(self.size, device, self.ranks, workload) for workload in self.parsed])

    def mix(self, workload: str, tokens: int, device: str) -> Mix:
        """Return the steady mix of a batch of `tokens` on a device."""
        parsed = MeanWorkload.parse(workload)
        return batch_mix(parsed, tokens, natural_tokens(self.size, device, self.ranks, parsed))

    def key(self, profile: Profile, sizes: Sequence[int], effort: Effort) -> SearchKey:
        """Return the key of the files of this search."""
        return SearchKey(
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
