"""The picture of a plan."""

from xml.etree import ElementTree

import pytest
from nanoflow_search.emit.picture import LANE, WIDTH, draw_period
from nanoflow_search.plan.problem import CyclicTimeline, NanoTask, PlacedTask, Problem, Task
from nanoflow_search.plan.stage_two import ShareAssignment

TASKS = (Task("qkv", "compute", {}), Task("a<b", "memory", {}))
FIRST, SECOND, READ = NanoTask("qkv", 0, 1), NanoTask("qkv", 1, 2), NanoTask("a<b", 0, 2)
TIMELINE = CyclicTimeline(
    100.0, (PlacedTask(FIRST, 0, 40, 0), PlacedTask(SECOND, 40, 60, 1), PlacedTask(READ, 70, 50, 0))
)
SVG = "{http://www.w3.org/2000/svg}"


def test_bars_are_as_long_and_as_high_as_their_launches() -> None:
    shares = ShareAssignment(TIMELINE, {FIRST: None, SECOND: 66, READ: 33}, 0.0)
    root = ElementTree.fromstring(draw_period(Problem(2, TASKS, ()), shares, 132, 512))
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


def test_labels_that_do_not_fit_go_into_the_legend_and_the_caption_says_what_is_drawn() -> None:
    """And no label is cut: every text is shorter than its bar, or a number that the legend explains."""
    short = PlacedTask(FIRST, 0, 5, 0)
    timeline = CyclicTimeline(100.0, (short, PlacedTask(SECOND, 40, 60, 1), PlacedTask(READ, 70, 50, 0)))
    shares = ShareAssignment(timeline, {FIRST: None, SECOND: 66, READ: 33}, 0.0)
    root = ElementTree.fromstring(draw_period(Problem(2, TASKS, ()), shares, 132, 512, "tiny, 1/1 tokens, <GPU>"))
    shown = {
        str(group.find(f"{SVG}title").text): str(group.find(f"{SVG}svg/{SVG}text").text)  # type: ignore[union-attr]
        for group in root.iter(f"{SVG}g")
    }
    assert shown["qkv 0..512"] == "1"
    assert shown["a<b 0..1024, 33 SMs"] == "a<b 0..1024, 33 SMs"
    texts = [str(text.text) for text in root.findall(f"{SVG}text")]
    assert texts[-1] == "1: qkv 0..512"
    assert texts[0] == "tiny, 1/1 tokens, <GPU>; one layer in the steady state: 100 us, 1024 tokens"
    bottom = max(float(text.attrib["y"]) for text in root.findall(f"{SVG}text"))
    assert bottom < float(root.attrib["viewBox"].split()[3])
