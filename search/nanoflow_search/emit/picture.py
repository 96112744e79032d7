"""draw: one period of a plan as a picture, like the paper's Fig. 6: lanes, nano-batches in colours, SMs as height.

walked: such a period of any schedule, as predicted.
"""

from __future__ import annotations

from xml.sax.saxutils import escape

from nanoflow_backend.schedule.plan import Schedule
from nanoflow_search.plan.problem import NanoTask, Placed, Problem, Timeline
from nanoflow_search.plan.stage_two import Shares
from nanoflow_search.predict.predict import predict, walk_at
from nanoflow_search.predict.timing_model import Measured

WIDTH, LANE, LEFT, TOP, GAP = 1000.0, 70.0, 80.0, 26.0, 14.0
LAYERS = 8
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2")


def draw(problem: Problem, shares: Shares, device_sms: int, chunk_tokens: int) -> str:
    """An SVG. A launch that ends in the next period goes on at the left; a colour is where its tokens start; a bar as
    high as its lane has all SMs. Launches of a layer ahead are marked +1."""
    timeline = shares.timeline
    bottom = TOP + len(problem.lanes) * (LANE + GAP)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 10:g} {bottom + 20:g}" '
        'font-family="sans-serif" font-size="11">',
        f'<text x="{LEFT:g}" y="16">one layer in the steady state: {timeline.period_us:.0f} us, '
        f"{problem.chunks * chunk_tokens} tokens</text>",
    ]
    colour = _colours(timeline)
    for row, lane in enumerate(problem.lanes):
        floor = TOP + row * (LANE + GAP) + LANE
        lines.append(f'<text x="4" y="{floor - LANE / 2:g}">{escape(lane)}</text>')
        lines.append(f'<line x1="{LEFT:g}" x2="{LEFT + WIDTH:g}" y1="{floor:g}" y2="{floor:g}" stroke="#999"/>')
        for placed in timeline.placed:
            if problem[placed.nano.task].lane == lane:
                height = LANE * (shares.sms[placed.nano] or device_sms) / device_sms
                fill = colour[placed.nano.start]
                label = _label(placed, shares, chunk_tokens)
                lines += [_bar(x, width, floor, height, fill, label) for x, width in _pieces(placed, timeline)]
    return "\n".join([*lines, "</svg>", ""])


def walked(schedule: Schedule, problem: Problem, measured: Measured, chunk_tokens: int) -> Shares:
    """The period in the middle of a few layers, where the ramps are over."""
    clock_mhz = predict(schedule, measured, LAYERS).clock_mhz
    spans_us = walk_at(schedule, measured.at(clock_mhz), LAYERS).spans_us
    span_us = dict(zip(schedule.unroll(LAYERS), spans_us, strict=True))
    launches, middle = list(enumerate(schedule.launches)), LAYERS // 2
    begin, until = (span_us[middle + ahead + schedule.launches[0].layers_ahead, 0][0] for ahead in (0, 1))
    sms: dict[NanoTask, int | None] = {}
    placed: list[Placed] = []
    for task in problem.tasks:
        for number, launch in launches:
            if launch.operation != task.operations[0]:
                continue
            nano = NanoTask(task.name, launch.start // chunk_tokens, launch.stop // chunk_tokens)
            layer = middle + launch.layers_ahead
            ends_us = [
                span_us[layer, n][1]
                for n, other in launches
                if other.operation in task.operations and (other.start, other.stop) == (launch.start, launch.stop)
            ]
            start_us = span_us[layer, number][0]
            sms[nano] = schedule.sms(launch)
            placed.append(Placed(nano, start_us - begin, max(ends_us) - start_us, launch.layers_ahead))
    return Shares(Timeline(until - begin, tuple(placed)), sms, 0.0)


def _colours(timeline: Timeline) -> dict[int, str]:
    starts = sorted({placed.nano.start for placed in timeline.placed})
    return {start: COLOURS[index % len(COLOURS)] for index, start in enumerate(starts)}


def _pieces(placed: Placed, timeline: Timeline) -> list[tuple[float, float]]:
    """(x, width) inside the period: two where the launch runs over its end."""
    scale = WIDTH / timeline.period_us
    start = placed.start_us % timeline.period_us
    first = min(placed.duration_us, timeline.period_us - start)
    pieces = [(start, first), (0.0, placed.duration_us - first)]
    return [(LEFT + x * scale, us * scale) for x, us in pieces if us * scale > 0.01]


def _label(placed: Placed, shares: Shares, chunk_tokens: int) -> str:
    nano, sms = placed.nano, shares.sms[placed.nano]
    ahead = f" +{placed.layers_ahead}" if placed.layers_ahead else ""
    owned = f", {sms} SMs" if sms is not None else ""
    return f"{nano.task}{ahead} {nano.start * chunk_tokens}..{nano.stop * chunk_tokens}{owned}"


def _bar(x: float, width: float, floor: float, height: float, fill: str, label: str) -> str:
    return (
        f'<g><title>{escape(label)}</title><rect x="{x:.2f}" y="{floor - height:.2f}" width="{width:.2f}" '
        f'height="{height:.2f}" fill="{fill}" stroke="white"/>'
        f'<svg x="{x:.2f}" y="{floor - height:.2f}" width="{width:.2f}" height="{height:.2f}">'
        f'<text x="3" y="12" fill="white">{escape(label)}</text></svg></g>'
    )
