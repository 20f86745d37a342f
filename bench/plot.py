"""Small line charts as SVG, one panel beside another, for README. No library."""

from pathlib import Path
from typing import NamedTuple

COLOURS = ["#0969da", "#1a7f37", "#9a6700", "#cf222e", "#8250df"]
WIDTH, HEIGHT, LEFT, TOP = 380, 200, 60, 40  # of a panel's axes, and the space before and above them


class Panel(NamedTuple):
    title: str
    lines: list  # [(label, xs, ys)]; label "" = none
    top: float  # of the y axis, which begins at 0; higher values are cut
    foot: str  # what the x axis shows
    number: str = ".2f"  # format of the y axis
    dots: bool = False


def panel_parts(panel: Panel, left: int):
    far = max(max(xs) for _, xs, _ in panel.lines)
    place = lambda x, y: (left + WIDTH * x / far, TOP + HEIGHT * (1 - min(y, panel.top) / panel.top))
    yield f'<text x="{left}" y="24" font-weight="600">{panel.title}</text>'
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = TOP + HEIGHT * (1 - share)
        yield f'<line x1="{left}" x2="{left + WIDTH}" y1="{y}" y2="{y}" stroke="#d0d7de"/>'
        yield f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{share * panel.top:{panel.number}}</text>'
    for (label, xs, ys), colour in zip(panel.lines, COLOURS):
        points = [place(x, y) for x, y in zip(xs, ys, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>'
        if panel.dots:
            yield from (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in points)
        if label:
            x, y = points[-1]
            yield f'<text x="{x - 8:.1f}" y="{y - 8:.1f}" text-anchor="end" fill="{colour}">{label}</text>'
    yield f'<text x="{left + WIDTH}" y="{TOP + HEIGHT + 20}" text-anchor="end">{panel.foot}</text>'


def draw(path: Path, panels: list[Panel]) -> None:
    wide = (LEFT + WIDTH + 30) * len(panels) - 10
    size = f'viewBox="0 0 {wide} {TOP + HEIGHT + 35}"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">']
    parts.append(f'<rect width="{wide}" height="{TOP + HEIGHT + 35}" fill="#fff"/>')
    for number, panel in enumerate(panels):
        parts += panel_parts(panel, LEFT + (LEFT + WIDTH + 30) * number)
    path.write_text("".join(parts) + "</svg>\n")
