"""A GPU that is made up, and the commands of benchmarks/overlap on it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nanoflow_search.profile.data import Profile
from support.simulated.overlap_machine import LAYER, MIX, Machine, command, profile_of

from nanoflow_backend.graph.operation import Graph


@pytest.fixture(scope="module")
def graph() -> Graph:
    return LAYER


@pytest.fixture(scope="module")
def profile(graph: Graph) -> Profile:
    return profile_of(graph, MIX)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.fixture
def run(tmp_path: Path, profile: Profile) -> Callable[..., dict[str, Any]]:
    return command(tmp_path, profile)
