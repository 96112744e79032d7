"""Programs in simulated time: what the CPU computes, on a simulated GPU's clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from support.simulated.gpu import SimulatedBurst, SimulatedGpu, SimulatedWork

from nanoflow_backend.runtime.binding import Binding
from nanoflow_backend.runtime.cpu import CpuProgram

LAUNCH_S = 1e-4


class Programs:
    """Makes CPU programs whose forward takes time on a simulated GPU: so much a launch, `layers` times.

    What they compute is computed once, and while somebody watches.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.gpu = SimulatedGpu()
        self.made: list[CpuProgram] = []
        self.launches = 0

    def __call__(self, binding: Binding, *, max_rows: int) -> CpuProgram:
        program = CpuProgram(binding)
        plain = program.forward

        def forward(*inputs: Any) -> None:
            self.launches = len(binding.plans[0].schedule.launches)
            if not program.plan.tokens or program._watcher:
                plain(*inputs)

        program.forward = forward  # type: ignore[method-assign]
        self.made.append(program)
        return program

    def burst(self, launches: Callable[[], None]) -> SimulatedBurst:
        launches()
        return SimulatedWork(self.gpu, self.layers * self.launches * LAUNCH_S, 300.0, calls=1).launch()
