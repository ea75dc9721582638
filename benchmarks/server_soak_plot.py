"""Draws the samples of `server_soak.py` as one SVG: host memory and median latency over the number of requests."""

WIDTH, HEIGHT, LEFT, TOP, GAP = 640, 150, 70, 40, 70
PANELS = (("memory_mib", "host memory of the server and its engine, MiB"), ("p50_ms", "median latency, ms"))


def plot(samples):
    """Return SVG text of samples with `requests`, `memory_mib` and `p50_ms`."""
    width, height = LEFT + WIDTH + 30, TOP + len(PANELS) * (HEIGHT + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    last = samples[-1]["requests"]
    for place, (field, title) in enumerate(PANELS):
        top = TOP + place * (HEIGHT + GAP)
        values = [(sample["requests"], sample[field]) for sample in samples if sample[field] is not None]
        highest = 1.15 * max(value for _, value in values)
        parts.append(f'<text x="{LEFT}" y="{top - 10}" font-weight="bold">{title}</text>')
        parts.append(f'<rect x="{LEFT}" y="{top}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#999" />')
        for step in range(5):
            y = top + HEIGHT * (1 - step / 4)
            x = LEFT + WIDTH * step / 4
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{highest * step / 4:.0f}</text>')
            parts.append(f'<text x="{x:.1f}" y="{top + HEIGHT + 16}" text-anchor="middle">{last * step // 4:,}</text>')
        points = " ".join(
            f"{LEFT + WIDTH * number / last:.1f},{top + HEIGHT * (1 - value / highest):.1f}" for number, value in values
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="#2563eb" stroke-width="1.5"/>')
        parts.append(f'<text x="{LEFT + WIDTH / 2}" y="{top + HEIGHT + 34}" text-anchor="middle">requests</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
