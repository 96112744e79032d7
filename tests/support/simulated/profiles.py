"""Synthetic devices and their profiles."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from nanoflow_search.cost.devices import DEVICES
from nanoflow_search.hardware.synthetic import SyntheticDevice
from nanoflow_search.profile.data import Profile
from nanoflow_search.profile.load import LoadsToMeasure
from nanoflow_search.profile.measure import profile_header, take_profile

from nanoflow_backend.graph.operation import Graph


def capped(graph: Graph, cap_w: float) -> SyntheticDevice:
    """An H200 with another power cap."""
    spec = DEVICES["H200-sustained"]
    assert spec.power is not None
    return SyntheticDevice(graph, replace(spec, power=replace(spec.power, cap_w=cap_w)))


def profiled(device: SyntheticDevice, graph: Graph, loads: LoadsToMeasure) -> Profile:
    with tempfile.TemporaryDirectory() as folder:
        return take_profile(device, profile_header(device, graph), *loads, Path(folder) / "profile.json")
