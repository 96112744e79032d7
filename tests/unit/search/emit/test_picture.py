"""The picture of a plan."""

from xml.etree import ElementTree

import pytest
from nanoflow_search.emit.picture import LANE, WIDTH, draw
from nanoflow_search.plan.problem import NanoTask, Placed, Problem, Task, Timeline
from nanoflow_search.plan.stage_two import Shares

TASKS = (Task("qkv", "compute", {}), Task("a<b", "memory", {}))
FIRST, SECOND, READ = NanoTask("qkv", 0, 1), NanoTask("qkv", 1, 2), NanoTask("a<b", 0, 2)
TIMELINE = Timeline(100.0, (Placed(FIRST, 0, 40, 0), Placed(SECOND, 40, 60, 1), Placed(READ, 70, 50, 0)))
SVG = "{http://www.w3.org/2000/svg}"


def test_bars_are_as_long_and_as_high_as_their_launches() -> None:
    shares = Shares(TIMELINE, {FIRST: None, SECOND: 66, READ: 33}, 0.0)
    root = ElementTree.fromstring(draw(Problem(2, TASKS, ()), shares, 132, 512))
    bars: dict[str, list[dict[str, str]]] = {}
    for group in root.iter(f"{SVG}g"):
        title, rect = group.find(f"{SVG}title"), group.find(f"{SVG}rect")
        assert title is not None
        assert rect is not None
        bars.setdefault(str(title.text), []).append(rect.attrib)
    assert list(bars) == ["qkv 0..512", "qkv +1 512..1024, 66 SMs", "a<b 0..1024, 33 SMs"]
    lengths = [sum(float(bar["width"]) for bar in found) / WIDTH for found in bars.values()]
    assert lengths == pytest.approx([0.4, 0.6, 0.5])
    heights = [float(found[0]["height"]) / LANE for found in bars.values()]
    assert heights == pytest.approx([1, 0.5, 0.25], abs=1e-3)
    assert len(bars["a<b 0..1024, 33 SMs"]) == 2  # it runs on at the left
    fills = [found[0]["fill"] for found in bars.values()]
    assert fills[0] == fills[2] != fills[1]
