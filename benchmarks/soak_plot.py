"""Draws the measurements of `live_soak.py` as one SVG: four panels over the frame number, both fusions in each."""

from html import escape

WIDTH, HEIGHT, LEFT, TOP, GAP = 420, 200, 64, 60, 84
PANELS = (
    ("pages", "KV-cache pages in use"),
    ("image_pages", "of these, image pages"),
    ("memory_mib", "host memory, MiB"),
    ("cpu_ms", "processor time a frame, ms"),
)
COLOURS = {"casa": "#2563eb", "insertion": "#dc2626"}
LABELS = {"casa": "CASA, text budget on", "insertion": "insertion, until its context is full"}


def plot(report):
    """SVG text of a report."""
    last = max(row["frame"] for name in COLOURS for row in report[name])
    width, height = 2 * (LEFT + WIDTH) + 40, TOP + 2 * (HEIGHT + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for index, name in enumerate(COLOURS):
        x = LEFT + index * 260
        parts.append(f'<rect x="{x}" y="14" width="14" height="14" fill="{COLOURS[name]}"/>')
        parts.append(f'<text x="{x + 20}" y="26" font-size="14">{escape(LABELS[name])}</text>')
    for index, (field, title) in enumerate(PANELS):
        x, y = LEFT + (index % 2) * (WIDTH + LEFT), TOP + (index // 2) * (HEIGHT + GAP)
        parts += panel(report, field, title, x, y, last)
    return "\n".join([*parts, "</svg>"]) + "\n"


def panel(report, field, title, x, y, last):
    """One panel with its upper left corner at (x, y)."""
    top = 1.15 * max(1.0, *(row[field] for name in COLOURS for row in report[name]))
    parts = [
        f'<text x="{x}" y="{y - 8}" font-size="13" font-weight="bold">{escape(title)}</text>',
        f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#999"/>',
    ]
    for step in range(5):
        at = y + HEIGHT * (1 - step / 4)
        parts.append(f'<line x1="{x}" x2="{x + WIDTH}" y1="{at:.1f}" y2="{at:.1f}" stroke="#e5e5e5"/>')
        value = f"{top * step / 4:.3g}" if top < 1000 else f"{top * step / 4:.0f}"
        parts.append(f'<text x="{x - 6}" y="{at + 4:.1f}" font-size="11" text-anchor="end">{value}</text>')
        frame = f"{last * step // 4:,}"
        along = x + WIDTH * step / 4
        parts.append(f'<text x="{along:.1f}" y="{y + HEIGHT + 16}" font-size="11" text-anchor="middle">{frame}</text>')
    for name, colour in COLOURS.items():
        points = [
            f"{x + WIDTH * row['frame'] / last:.1f},{y + HEIGHT * (1 - row[field] / top):.1f}" for row in report[name]
        ]
        parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="2"/>')
    parts.append(f'<text x="{x + WIDTH / 2}" y="{y + HEIGHT + 32}" font-size="11" text-anchor="middle">frame</text>')
    return parts
