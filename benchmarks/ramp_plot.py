"""Draws the measurements of `cluster_ramp.py` as one SVG: clients, replicas and latency over the same time."""

import math
import statistics

WIDTH, HEIGHT, LEFT, TOP, GAP = 640, 120, 60, 40, 44
BLUE, PALE, RED = "#2563eb", "#bfdbfe", "#dc2626"
WINDOW_S = 5.0


def plot(samples, answers):
    """SVG text.

    Args:
        samples: Mappings with `s` (seconds), `clients`, `running` and `other` (replicas that come or go).
        answers: Mappings with `s`, when an answer was complete, and `latency_s`.
    """
    end = max(samples[-1]["s"], answers[-1]["s"])
    clients = [(sample["s"], sample["clients"]) for sample in samples]
    running = [(sample["s"], sample["running"]) for sample in samples]
    present = [(sample["s"], sample["running"] + sample["other"]) for sample in samples]
    dots = [(answer["s"], answer["latency_s"]) for answer in answers]
    height = TOP + 3 * (HEIGHT + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 20} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{LEFT + WIDTH + 20}" height="{height}" fill="white"/>',
        *panel(0, "clients, each asking again as soon as it is answered", end, [(clients, BLUE)], []),
        *panel(
            1,
            "replicas that take requests (dark), and with those that start or drain (pale)",
            end,
            [(present, PALE), (running, BLUE)],
            [],
        ),
        *panel(2, "latency of each answer, s (dots), and the median of 5 s (line)", end, [(medians(dots), RED)], dots),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def medians(dots):
    """The median of every 5 s in which there were answers, at their middle."""
    windows = {}
    for second, value in dots:
        windows.setdefault(math.floor(second / WINDOW_S), []).append(value)
    return [((number + 0.5) * WINDOW_S, statistics.median(windows[number])) for number in sorted(windows)]


def panel(place, title, end, lines, dots):
    """One panel: lines that step from value to value where they count, and dots."""
    top = TOP + place * (HEIGHT + GAP)
    highest = max(value for series in (*(line for line, _ in lines), dots) for _, value in series) * 1.1

    def at(second, value):
        return f"{LEFT + second / end * WIDTH:.1f},{top + HEIGHT - value / highest * HEIGHT:.1f}"

    parts = [
        f'<text x="{LEFT}" y="{top - 8}">{title}</text>',
        f'<path d="M{LEFT},{top}V{top + HEIGHT}H{LEFT + WIDTH}" fill="none" stroke="#888"/>',
    ]
    for value in ticks(highest):
        x, y = at(0, value).split(",")
        parts.append(f'<text x="{LEFT - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{value:g}</text>')
        parts.append(f'<path d="M{x},{y}H{LEFT + WIDTH}" stroke="#eee"/>')
    for second in ticks(end):
        x = at(second, 0).split(",")[0]
        parts.append(f'<text x="{x}" y="{top + HEIGHT + 15}" text-anchor="middle">{second:g} s</text>')
    for dot in dots:
        x, y = at(*dot).split(",")
        parts.append(f'<circle cx="{x}" cy="{y}" r="1.5" fill="{BLUE}" fill-opacity="0.35"/>')
    for line, colour in lines:
        points = line if dots else steps(line)
        path = " ".join(at(*point) for point in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
    return parts


def steps(line):
    """The same line with a corner before each change."""
    return [
        point
        for (_, before), (second, value) in zip(line[:1] + line, line, strict=False)
        for point in ((second, before), (second, value))
    ]


def ticks(highest):
    """Round numbers from 0 to `highest`, at most six."""
    step = next(step * 10**power for power in range(-2, 6) for step in (1, 2, 5) if highest / (step * 10**power) <= 5)
    return [step * number for number in range(int(highest / step) + 1)]
