"""Bars of tasks per second on a logarithmic scale, as an SVG file that reads on light and on dark pages."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parts.figures import Row

WIDTH, LEFT, RIGHT = 760, 190, 90
TOP, BAR, GAP, HEAD = 44, 20, 6, 30
COLOURS = {"raw": "#8a8f98", "peer": "#c98a3d", "wove": "#3d7ec9", "map": "#1b9e6b"}
GROUPS = (
    ("celery", "Celery, prefork ×2"),
    ("rq-fork", "RQ, a fork per job"),
    ("rq-simple", "RQ, SimpleWorker"),
)
STYLE = (
    "text{font:13px system-ui,-apple-system,'Segoe UI',sans-serif;fill:#24292f}.small{font-size:11px;fill:#57606a}"
    ".head{font-weight:600}.grid{stroke:#d0d7de;stroke-width:1}.page{fill:#ffffff}"
    "@media (prefers-color-scheme:dark){text{fill:#e6edf3}.small{fill:#9198a1}.grid{stroke:#3d444d}.page{fill:#0d1117}}"
)


class Bar(NamedTuple):
    """One bar."""

    label: str
    value: float
    colour: str


def throughput_plot(rows: Sequence[Row]) -> str:
    """Return an SVG document of the no-op rows that are among these; without any it is empty."""
    groups = [(title, bars) for key, title in GROUPS if (bars := _bars(key, rows))]
    values = [bar.value for _, bars in groups for bar in bars] or [1.0]
    low = math.floor(math.log10(min(values)))
    high = max(low + 1, math.ceil(math.log10(max(values))))
    height = TOP + sum(HEAD + len(bars) * (BAR + GAP) for _, bars in groups) + 34
    drawn = [_text(16, 24, "No-op tasks per second (logarithmic scale)", "head")]
    foot = height - 30
    for power in range(low, high + 1):
        x = _x(10.0**power, low, high)
        drawn.append(f'<line class="grid" x1="{x:.1f}" y1="{TOP - 6}" x2="{x:.1f}" y2="{foot}"/>')
        drawn.append(_text(x, foot + 16, f"{10**power:,}", "small", "middle"))
    y = float(TOP)
    for title, bars in groups:
        drawn.append(_text(16, y + 18, title, "head"))
        y += HEAD
        for bar in bars:
            end = _x(bar.value, low, high)
            width = max(2.0, end - LEFT)
            drawn.append(_text(LEFT - 8, y + 15, bar.label, "", "end"))
            drawn.append(
                f'<rect x="{LEFT}" y="{y:.1f}" width="{width:.1f}" height="{BAR}" rx="2" fill="{bar.colour}"/>'
            )
            drawn.append(_text(LEFT + width + 6, y + 15, f"{bar.value:,.0f}"))
            y += BAR + GAP
    body = "\n".join(drawn)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="No-op tasks per second"><style>{STYLE}</style>\n'
        f'<rect class="page" width="{WIDTH}" height="{height}"/>\n{body}\n</svg>\n'
    )


def _bars(key: str, rows: Sequence[Row]) -> list[Bar]:
    found = {row.key: row for row in rows}
    wanted = (
        (f"{key}-unbatched", "raw", "raw", "raw"),
        (f"{key}-unbatched", "peer", "Wove 2.0.3", "peer"),
        (f"{key}-unbatched", "wove", "Wove, calls at once", "wove"),
        (f"{key}-map", "wove", "Wove, map", "map"),
    )
    bars = []
    for row_key, contender, label, colour in wanted:
        row = found.get(row_key)
        median = row.median(contender) if row else None
        if median:
            bars.append(Bar(label, median, COLOURS[colour]))
    return bars


def _x(value: float, low: int, high: int) -> float:
    share = (math.log10(value) - low) / (high - low)
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
