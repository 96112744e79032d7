"""Synthetic devices and their profiles."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from nanoflow_search.cost.devices import DEVICES
from nanoflow_search.hardware.synthetic import SyntheticDevice
from nanoflow_search.profile.data import Profile
from nanoflow_search.profile.measure import header_of, take_profile
from nanoflow_search.profile.points import Loads

from nanoflow_backend.graph.operation import Graph


def capped(graph: Graph, cap_w: float) -> SyntheticDevice:
    """An H200 with another power cap."""
    spec = DEVICES["H200-sustained"]
    assert spec.power is not None
    return SyntheticDevice(graph, replace(spec, power=replace(spec.power, cap_w=cap_w)))


def profiled(device: SyntheticDevice, graph: Graph, loads: Loads) -> Profile:
    with tempfile.TemporaryDirectory() as folder:
        return take_profile(device, header_of(device, graph), *loads, Path(folder) / "profile.json")
