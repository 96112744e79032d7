"""A batch case holds what a search knows of batches of one size, on a machine of which there is a profile."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import msgspec

from nanoflow_backend.graph.collectives import Forms, in_forms
from nanoflow_backend.graph.operation import Graph
from nanoflow_backend.schedule.plan import Schedule
from nanoflow_search.cost.batch_sizes import chunk_tokens
from nanoflow_search.cost.workload import Mix
from nanoflow_search.plan.bound import bounds_us
from nanoflow_search.plan.op_graph import layer_problem
from nanoflow_search.plan.problem import Problem
from nanoflow_search.predict.predict import predict
from nanoflow_search.predict.timing_model import TimingModel
from nanoflow_search.profile.data import Profile
from nanoflow_search.request import SearchRequest


@dataclass(frozen=True)
class BatchCase:
    """Batches of `tokens` tokens, for one request."""

    request: SearchRequest
    profile: Profile
    tokens: int

    @property
    def chunk_tokens(self) -> int:
        """The tokens of a chunk: the two stages cut at multiples of it."""
        return chunk_tokens(self.tokens)

    @property
    def forms(self) -> list[Forms]:
        """The forms of all-reduces to plan for: those whose operations were all measured."""
        known = {curve.partition("/")[0] for curve in self.profile.operations}
        return [forms for forms in self.request.forms if {op.name for op in self.graph(forms).operations} <= known]

    def graph(self, forms: Forms = {}) -> Graph:  # noqa: B006  nobody changes it
        """Return a layer's op graph with its all-reduces in `forms`."""
        return in_forms(self.request.model.layer, forms, self.request.ranks)

    def mix(self, workload: str) -> Mix:
        """Return the steady mix of these batches."""
        return self.request.mix(workload, self.tokens, self.profile.header.device)

    def timing_model(self, workload: str) -> TimingModel:
        """Return the timing model of the steady mix, at the highest clock."""
        return TimingModel(self.profile, self.mix(workload))

    def shared_timing_model(self, workload: str) -> TimingModel | None:
        """Return the timing model of lanes that share SMs; None: no such pair was measured."""
        pairs = [pair for pair in self.profile.pairs if None in (pair.first_sms, pair.second_sms)]
        profile = msgspec.structs.replace(self.profile, pairs=pairs)
        return TimingModel(profile, self.mix(workload)) if pairs else None

    def problem(self, model: TimingModel, forms: Forms = {}) -> Problem:  # noqa: B006
        """Return the problem of stage one, with the times of a timing model."""
        return layer_problem(self.graph(forms), self.request.ranks, self.tokens, self.chunk_tokens, model.operations_us)

    def predicted_us(self, schedule: Schedule, workload: str) -> float:
        """Return the predicted time of a layer."""
        return predict(schedule, self.timing_model(workload), self.request.model.num_layers).layer_us

    def bounds_us(self) -> dict[str, float]:
        """Return the lower bounds on the time of a layer by name, on the first workload: those of the form of
        all-reduces whose highest bound is lowest."""
        model = self.timing_model(self.request.workloads[0])
        by_form = [bounds_us(partial(self.problem, forms=forms), model, self.chunk_tokens) for forms in self.forms]
        return min(by_form, key=lambda bounds: max(bounds.values()))
