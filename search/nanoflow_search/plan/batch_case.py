"""Case: batches of one size, on a machine of which there is a profile: what a search knows of them."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from nanoflow_backend.graph.collectives import split_all_reduce
from nanoflow_backend.graph.operation import Graph
from nanoflow_backend.schedule.plan import Schedule
from nanoflow_search.cost.batch_sizes import chunk_tokens
from nanoflow_search.cost.work import Mix
from nanoflow_search.plan.bound import bounds_us
from nanoflow_search.plan.op_graph import layer_problem
from nanoflow_search.plan.problem import Problem
from nanoflow_search.predict.predict import predict
from nanoflow_search.predict.timing_model import Measured
from nanoflow_search.profile.data import Profile
from nanoflow_search.request import Setting

Form = tuple[str, ...]  # the all-reduces that run as reduce-scatter and all-gather


@dataclass(frozen=True)
class Case:
    setting: Setting
    profile: Profile
    tokens: int

    @property
    def chunk_tokens(self) -> int:
        return chunk_tokens(self.tokens)

    @property
    def forms(self) -> list[Form]:
        """No all-reduce in two; and all of them, where the profile knows that."""
        layer, known = self.setting.model.layer, {curve.partition("/")[0] for curve in self.profile.operations}
        reduces = tuple(op.name for op in layer.operations if op.kernel == "all_reduce")
        measured = {op.name for op in self.graph(reduces).operations} <= known
        return [(), reduces] if self.setting.ranks > 1 and measured else [()]

    def graph(self, form: Form = ()) -> Graph:
        return split_all_reduce(self.setting.model.layer, form, self.setting.ranks)

    def mix(self, workload: str) -> Mix:
        return self.setting.mix(workload, self.tokens, self.profile.header.device)

    def measured(self, workload: str) -> Measured:
        return Measured(self.profile, self.mix(workload))

    def shared(self, workload: str) -> Measured | None:
        """What was measured of lanes that share SMs; None: nothing was."""
        pairs = [pair for pair in self.profile.pairs if None in (pair.first_sms, pair.second_sms)]
        profile = msgspec.structs.replace(self.profile, pairs=pairs)
        return Measured(profile, self.mix(workload)) if pairs else None

    def problem(self, measured: Measured, form: Form = ()) -> Problem:
        return layer_problem(self.graph(form), self.setting.ranks, self.tokens, self.chunk_tokens, measured.times)

    def predicted_us(self, schedule: Schedule, workload: str) -> float:
        """Of a layer."""
        return predict(schedule, self.measured(workload), self.setting.model.num_layers).layer_us

    def bounds_us(self) -> dict[str, float]:
        """What no plan goes below, by name; on the first workload."""
        return bounds_us(self.problem, self.measured(self.setting.workloads[0]), self.chunk_tokens)
