"""Draws the turns of streams as one SVG: what a frame costs, over the number of frames, all runs in each panel."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

WIDTH, HEIGHT, LEFT, TOP, GAP = 420, 190, 70, 30, 74
COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#475569")
# Turns whose median is one point of a line of times.
POINTS = 64


@dataclass(frozen=True)
class Panel:
    """One panel: its title, and a turn's value in it (None where the backend saw none)."""

    title: str
    value: Callable[[dict[str, Any]], float | None]


PANELS = (
    Panel("first token, ms", lambda turn: turn["ttft_ms"]),
    Panel("tokens a second", lambda turn: turn["tokens_per_s"]),
    Panel("processor time a turn, ms", lambda turn: turn["cpu_ms"]),
    Panel("KV cache in use, MiB", lambda turn: None if turn["kv_bytes"] is None else turn["kv_bytes"] / 2**20),
)


def plot(runs: list[dict[str, Any]]) -> str:
    """Return SVG text.

    Args:
        runs: Those of a report of `stream`.
    """
    height = TOP + 18 * len(runs) + 2 * (HEIGHT + GAP)
    width = 2 * (LEFT + WIDTH) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, run in enumerate(runs):
        label = f"{run['name']}: {run['about'].get('fusion') or 'endpoint'}, {run['backend']}"
        y = 20 + 18 * number
        parts.append(f'<rect x="{LEFT}" y="{y - 10}" width="12" height="12" fill="{_colour(number)}"/>')
        parts.append(f'<text x="{LEFT + 18}" y="{y}">{escape(label)}</text>')
    for place, panel in enumerate(PANELS):
        x, y = LEFT + (place % 2) * (WIDTH + LEFT), TOP + 18 * len(runs) + 10 + (place // 2) * (HEIGHT + GAP)
        parts += _draw(panel, runs, x, y)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _draw(panel: Panel, runs: list[dict[str, Any]], x: int, y: int) -> list[str]:
    """Return one panel with its upper left corner at (x, y)."""
    lines = [points(panel, run["rows"]) for run in runs]
    highest = 1.1 * max((value for line in lines for _, value in line), default=1.0) or 1.0
    last = max((len(run["rows"]) for run in runs), default=1) or 1
    parts = [
        f'<text x="{x}" y="{y - 7}" font-weight="bold">{escape(panel.title)}</text>',
        f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#999"/>',
        f'<text x="{x + WIDTH / 2}" y="{y + HEIGHT + 32}" text-anchor="middle">frames</text>',
    ]
    for step in range(5):
        at, along = y + HEIGHT * (1 - step / 4), x + WIDTH * step / 4
        parts.append(f'<path d="M{x},{at:.1f}H{x + WIDTH}" stroke="#e5e5e5"/>')
        parts.append(f'<text x="{x - 6}" y="{at + 4:.1f}" text-anchor="end">{highest * step / 4:.3g}</text>')
        parts.append(f'<text x="{along:.1f}" y="{y + HEIGHT + 16}" text-anchor="middle">{last * step // 4:,}</text>')
    for number, line in enumerate(lines):
        path = " ".join(
            f"{x + WIDTH * turn / last:.1f},{y + HEIGHT * (1 - value / highest):.1f}" for turn, value in line
        )
        parts.append(f'<polyline points="{path}" fill="none" stroke="{_colour(number)}" stroke-width="2"/>')
    return parts


def points(panel: Panel, rows: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Return at most `POINTS` points of a line: medians of neighbouring turns, so that it shows more than noise."""
    known = [(row["turn"] + 1, value) for row in rows if (value := panel.value(row)) is not None]
    size = -(-len(known) // POINTS) or 1
    groups = [known[start : start + size] for start in range(0, len(known), size)]
    return [
        (statistics.mean(turn for turn, _ in group), statistics.median(value for _, value in group)) for group in groups
    ]


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]
