"""A GPU that is made up stands in for the one that benchmarks/overlap times plans on; it has a profile."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
from msgspec.structs import replace
from nanoflow_search.cost.devices import DEVICES
from nanoflow_search.cost.workload import Mix
from nanoflow_search.hardware.plan_timer import PlanTimer
from nanoflow_search.hardware.synthetic import SyntheticDevice
from nanoflow_search.predict.predict import Timing
from nanoflow_search.profile.data import Profile
from nanoflow_search.profile.points import partition_loads
from support.places import ROOT
from support.simulated.profiles import profiled

from benchmarks.overlap import ablation, sensitivity, steady_batches
from nanoflow_backend.config.model_config import ModelConfig
from nanoflow_backend.graph.operation import Graph
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.runtime.device import Device
from nanoflow_backend.schedule.plan import Schedule

BENCHMARKS = ROOT / "benchmarks"
MODEL = BENCHMARKS / "models" / "llama-3-8b"
LAYER = build(read_model_config(MODEL)).layer
MIX = Mix(683, 1365, 1280, 512)  # of the profile
H200, CPU = Device("cuda", "NVIDIA H200", 132), Device("cpu", "cpu", None)
SHARES = (12, 28, 36)  # SMs that attention has in the profile


class Machine:
    """Times plans by the synthetic law, a little slower each time; says what it has timed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device = SyntheticDevice(LAYER, DEVICES["H200-sustained"], noise=0.0)
        self.mixes: list[Mix] = []
        self.timed: list[Schedule] = []
        self.here_is = H200
        monkeypatch.setattr(steady_batches, "find_device", lambda wanted: self.here_is)
        monkeypatch.setattr(PlanTimer, "here", self.here)

    def here(self, config: ModelConfig, mix: Mix, *, num_layers: int, **options: Any) -> Callable[[Schedule], Timing]:
        self.mixes.append(mix)

        def timer(plan: Schedule) -> Timing:
            self.timed.append(plan)
            found = self.device.time_plan(plan, mix, num_layers)
            slower = 1 + 1e-4 * len(self.timed)
            return found._replace(layer_us=found.layer_us * slower, layer_j=found.layer_j * slower)

        return timer


def profile_of(graph: Graph, mix: Mix, shares: Sequence[int] = SHARES) -> Profile:
    """A profile as if it were of an H200."""
    loads = partition_loads(graph, 132, mix, round(mix.tokens), shares)
    taken = profiled(SyntheticDevice(graph, DEVICES["H200-sustained"], noise=0.0), graph, loads)
    return replace(taken, header=replace(taken.header, device=H200.name))


def map_of(tokens: Sequence[int], contexts: Sequence[int]) -> list[str]:
    """The words that ask for a map of these cells."""
    asked = (("--tokens", size) for size in tokens), (("--context", mean) for mean in contexts)
    return [str(word) for pairs in asked for pair in pairs for word in pair]


def command(tmp_path: Path, profile: Profile) -> Callable[..., dict[str, Any]]:
    """A benchmark with this profile, saved in tmp_path: called with its name, its output and more words."""
    taken = tmp_path / "profile.json"
    profile.save(taken)

    def run(benchmark: str, output: Path, *words: str) -> dict[str, Any]:
        options = ("--model", MODEL, "--profile", taken, "--layers", "3", "--output", output, *words)
        app = typer.Typer()
        app.command()({"ablation": ablation, "sensitivity": sensitivity}[benchmark].main)
        app([*map(str, options)], standalone_mode=False)
        found: dict[str, Any] = json.loads(output.read_text())
        return found

    return run
