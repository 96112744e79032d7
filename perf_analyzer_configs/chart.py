"""A chart of a sweep as SVG: what clients waited against what they got."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

WIDTH, HEIGHT, MARGIN = 340, 240, 56
PANELS = (  # title, columns with their colours
    ("time to first token, ms", {"time_to_first_token_ms_p50": "#2a78b8", "time_to_first_token_ms_p99": "#b8502a"}),
    (
        "time per output token, ms",
        {"time_per_output_token_ms_p50": "#2a78b8", "time_per_output_token_ms_p99": "#b8502a"},
    ),
    ("output tokens/s", {"output_tokens_per_s": "#2a8a4a"}),
    ("goodput, requests/s", {"goodput_requests_per_s": "#2a8a4a"}),
)


def chart(rows: Sequence[dict[str, Any]]) -> str:
    """One panel for each of PANELS that the rows have, over requests/s."""
    panels = [(title, lines) for title, lines in PANELS if all(column in rows[0] for column in lines)]
    x = [row["requests_per_s"] for row in rows]
    body = "".join(
        f'<g transform="translate({index * WIDTH},0)">{_panel(title, x, lines, rows)}</g>'
        for index, (title, lines) in enumerate(panels)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH * len(panels)}" height="{HEIGHT}" '
        f'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>{body}</svg>\n'
    )


def _panel(title: str, x: Sequence[float], lines: dict[str, str], rows: Sequence[dict[str, Any]]) -> str:
    right, top = max(x), max(row[column] for column in lines for row in rows) or 1.0

    def place(load: float, value: float) -> str:
        return (
            f"{MARGIN + load / right * (WIDTH - MARGIN - 24):.1f},"
            f"{HEIGHT - MARGIN + 16 - value / top * (HEIGHT - MARGIN - 24):.1f}"
        )

    left, bottom = place(0, 0).split(",")
    parts = [
        f'<text x="{left}" y="20" font-weight="bold">{title}</text>',
        f'<path d="M{place(0, top)} L{place(0, 0)} L{place(right, 0)}" fill="none" stroke="#888"/>',
        f'<text x="{float(left) - 4}" y="38" text-anchor="end">{top:.3g}</text>',
        f'<text x="{float(left) - 4}" y="{bottom}" text-anchor="end">0</text>',
        f'<text x="{WIDTH - 24}" y="{float(bottom) + 16}" text-anchor="end">{right:.3g} requests/s</text>',
    ]
    for index, (column, colour) in enumerate(lines.items()):
        points = [place(load, row[column]) for load, row in zip(x, rows, strict=True)]
        parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{p.split(",")[0]}" cy="{p.split(",")[1]}" r="2.5" fill="{colour}"/>' for p in points]
        if len(lines) > 1:
            label = column.rsplit("_", 1)[1]
            parts.append(f'<text x="{WIDTH - 60}" y="{36 + 14 * index}" fill="{colour}">{label}</text>')
    return "".join(parts)
