"""A picture shows one period of a plan, as in NanoFlow's Fig. 6: lanes are rows, nano-batches colours, SMs heights."""

from __future__ import annotations

from xml.sax.saxutils import escape

from nanoflow_backend.schedule.plan import Schedule
from nanoflow_search.cost.batch_sizes import TILE
from nanoflow_search.plan.batch_case import BatchCase
from nanoflow_search.plan.op_graph import layer_problem
from nanoflow_search.plan.problem import CyclicTimeline, NanoTask, PlacedTask, Problem
from nanoflow_search.plan.stage_two import ShareAssignment
from nanoflow_search.predict.predict import predict, simulate_at
from nanoflow_search.predict.timing_model import TimingModel

WIDTH, LANE, LEFT, TOP, GAP, LINE = 1000.0, 70.0, 80.0, 26.0, 14.0, 16.0  # pixels
CHARACTER = 6.5  # pixels of a character on average; a label that may be wider than its bar goes into the legend
LAYERS = 8  # that are simulated; the one in the middle is drawn
NANO_BATCH_COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2")


def draw_plan(case: BatchCase, schedule: Schedule) -> str:
    """Return the SVG of any schedule for batches of a case, as it is predicted on the first workload."""
    request, workload = case.request, case.request.workloads[0]
    model = case.timing_model(workload)
    graph = case.graph(schedule.all_reduces)
    problem = layer_problem(graph, request.ranks, case.tokens, TILE, model.operations_us)
    shares = simulated_period(schedule, problem, model, TILE)
    header = case.profile.header
    caption = f"{request.name}, {workload} tokens in/out, {header.device}"
    return draw_period(problem, shares, header.device_sms, TILE, caption)


def draw_period(
    problem: Problem, shares: ShareAssignment, device_sms: int, chunk_tokens: int, caption: str = ""
) -> str:
    """Return the SVG of a period.

    A launch that ends in the next period goes on at the left. Its colour says where its tokens start; a bar as high as
    its lane has all SMs. Launches of a layer ahead are marked +1. Labels that do not fit their bar are numbered, and
    stand in the legend below.
    """
    timeline = shares.timeline
    colour = _colours(timeline)
    legend: list[str] = []
    bars: list[str] = []
    for row, lane in enumerate(problem.lanes):
        floor = TOP + row * (LANE + GAP) + LANE
        bars.append(f'<text x="4" y="{floor - LANE / 2:g}">{escape(lane)}</text>')
        bars.append(f'<line x1="{LEFT:g}" x2="{LEFT + WIDTH:g}" y1="{floor:g}" y2="{floor:g}" stroke="#999"/>')
        for placed in timeline.placed:
            if problem[placed.nano.task].lane == lane:
                height = LANE * (shares.sms[placed.nano] or device_sms) / device_sms
                label = _label(placed, shares, chunk_tokens)
                pieces = _pieces(placed, timeline)
                shown = label
                if len(label) * CHARACTER > max((width for _, width in pieces), default=0.0):
                    legend.append(label)
                    shown = str(len(legend))
                bars += [_bar(x, width, floor, height, colour[placed.nano.start], label, shown) for x, width in pieces]
    bottom = TOP + len(problem.lanes) * (LANE + GAP)
    keys = [
        f'<text x="{LEFT:g}" y="{bottom + LINE * (n + 1):g}">{n + 1}: {escape(label)}</text>'
        for n, label in enumerate(legend)
    ]
    about = f"{escape(caption)}; " if caption else ""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 10:g} '
        f'{bottom + LINE * len(legend) + 20:g}" font-family="sans-serif" font-size="11">',
        f'<text x="{LEFT:g}" y="16">{about}one layer in the steady state: {timeline.period_us:.0f} us, '
        f"{problem.chunks * chunk_tokens} tokens</text>",
    ]
    return "\n".join([*lines, *bars, *keys, "</svg>", ""])


def simulated_period(schedule: Schedule, problem: Problem, model: TimingModel, chunk_tokens: int) -> ShareAssignment:
    """Simulate a few layers of a schedule, and return the period in the middle, where the ramps are over."""
    clock_mhz = predict(schedule, model, LAYERS).clock_mhz
    spans_us = simulate_at(schedule, model.at(clock_mhz), LAYERS).spans_us
    span_us = dict(zip(schedule.unroll(LAYERS), spans_us, strict=True))
    launches, middle = list(enumerate(schedule.launches)), LAYERS // 2
    begin, until = (span_us[middle + ahead + schedule.launches[0].layers_ahead, 0][0] for ahead in (0, 1))
    sms: dict[NanoTask, int | None] = {}
    placed: list[PlacedTask] = []
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
            placed.append(PlacedTask(nano, start_us - begin, max(ends_us) - start_us, launch.layers_ahead))
    return ShareAssignment(CyclicTimeline(until - begin, tuple(placed)), sms, 0.0)


def _colours(timeline: CyclicTimeline) -> dict[int, str]:
    """Return a colour for each chunk at which nano-tasks start."""
    starts = sorted({placed.nano.start for placed in timeline.placed})
    return {start: NANO_BATCH_COLOURS[index % len(NANO_BATCH_COLOURS)] for index, start in enumerate(starts)}


def _pieces(placed: PlacedTask, timeline: CyclicTimeline) -> list[tuple[float, float]]:
    """Return (x, width) inside the period: two pieces where the launch runs over its end."""
    scale = WIDTH / timeline.period_us
    start = placed.start_us % timeline.period_us
    first = min(placed.duration_us, timeline.period_us - start)
    pieces = [(start, first), (0.0, placed.duration_us - first)]
    return [(LEFT + x * scale, us * scale) for x, us in pieces if us * scale > 0.01]


def _label(placed: PlacedTask, shares: ShareAssignment, chunk_tokens: int) -> str:
    nano, sms = placed.nano, shares.sms[placed.nano]
    ahead = f" +{placed.layers_ahead}" if placed.layers_ahead else ""
    owned = f", {sms} SMs" if sms is not None else ""
    return f"{nano.task}{ahead} {nano.start * chunk_tokens}..{nano.stop * chunk_tokens}{owned}"


def _bar(x: float, width: float, floor: float, height: float, fill: str, label: str, shown: str) -> str:
    """Return a bar with its label as tooltip and `shown` inside; the inner SVG cuts what is wider than the bar."""
    return (
        f'<g><title>{escape(label)}</title><rect x="{x:.2f}" y="{floor - height:.2f}" width="{width:.2f}" '
        f'height="{height:.2f}" fill="{fill}" stroke="white"/>'
        f'<svg x="{x:.2f}" y="{floor - height:.2f}" width="{width:.2f}" height="{height:.2f}">'
        f'<text x="3" y="12" fill="white">{escape(shown)}</text></svg></g>'
    )
