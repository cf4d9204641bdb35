"""A system as a picture: SVG that follows the reader's light or dark theme, or PNG and PDF through matplotlib."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from nestling.nested_system.drawing.layout import layout
from nestling.nested_system.drawing.shapes import BOX_HEIGHT, MARGIN, Band, Box, Layout, text_width
from nestling.nested_system.system import NestedSystem
from nestling.utils.files import new_file, write_text

THEMES = {
    "light": {
        "paper": "#fcfcfa",
        "band": "#f1f2f0",
        "card": "#ffffff",
        "ink": "#1c1d20",
        "muted": "#5c6068",
        "line": "#cfd1ce",
        "parametric": "#2563a8",
        "non-parametric": "#0b7f74",
        "backpropagation": "#b3261e",
        "initialization": "#7b4bb3",
        "generation": "#a1560a",
        "context": "#0f8f80",
        "training": "#c77a12",
        "model": "#4d5f7a",
        "unknown": "#b3261e",
    },
    "dark": {
        "paper": "#16171a",
        "band": "#1f2125",
        "card": "#292c31",
        "ink": "#ececea",
        "muted": "#a9adb5",
        "line": "#454952",
        "parametric": "#7db4ee",
        "non-parametric": "#5cc9bc",
        "backpropagation": "#ff8d85",
        "initialization": "#c39bf2",
        "generation": "#f2a65a",
        "context": "#4fc3b5",
        "training": "#e8ab52",
        "model": "#8fa5c9",
        "unknown": "#ff8d85",
    },
}
DASHES = {
    "parametric": (),
    "non-parametric": (7, 3),
    "backpropagation": (2, 3),
    "initialization": (10, 3, 2, 3),
    "generation": (),
}
LIFETIMES = {"context": "learns in the context", "training": "kept while training", "model": "saved with the model"}
# name: size, bold, colour
TEXTS = {"title": (17, True, "ink"), "level": (14, True, "ink"), "often": (12, False, "ink"), "kind": (13, True, "ink"),
         "maps": (12, False, "ink"), "where": (11, False, "muted"), "legend": (12, False, "muted")}  # fmt: skip


def draw(system: NestedSystem, path: str | Path | None = None, *, theme: str = "light") -> str:
    """Draw the levels as rows, fastest on top, their memories as boxes, and who teaches whom as arrows.

    Args:
        path: a file; its ending decides the format: .svg follows the reader's light or dark theme; .png, .pdf and what
            else matplotlib writes take `theme`. None writes nothing.

    Returns:
        The SVG.

    Raises:
        ValueError: an ending that is not known, a theme there is not.
    """
    if theme not in THEMES:
        raise ValueError(f"theme must be one of {', '.join(THEMES)}; got {theme!r}")
    plan = layout(system)
    svg = to_svg(plan)
    if path is None:
        return svg
    path = Path(path)
    if not path.suffix:
        raise ValueError(f"{path} has no ending to tell the format by: give it .svg, .png or .pdf")
    if path.suffix == ".svg":
        write_text(path, svg)
    else:
        with new_file(path) as aside:
            _with_matplotlib(plan, aside, THEMES[theme])
    return svg


def marks(plan: Layout) -> list[tuple]:
    """The picture as simple marks, back to front: ("rect", x, y, w, h, radius, fill, stroke),
    ("text", x, y, text, style), ("curve", points, kind, source, target), ("line", x0, y0, x1, y1, colour, width) and
    ("group", key, label, marks) for a box."""
    found: list[tuple] = [("text", MARGIN, 32, plan.title, "title"), ("text", MARGIN, 51, plan.subtitle, "legend")]
    for band in plan.bands:
        found += _band(band, plan.width)
    found += [("curve", curve.points, curve.link.kind, curve.link.source, curve.link.target) for curve in plan.curves]
    found += [("group", box.group.key, f"{box.lines[0]}, level {box.group.level}", _box(box)) for box in plan.boxes]
    return found + _legend(plan)


def _band(band: Band, width: float) -> list[tuple]:
    x, middle = MARGIN, band.top + band.height / 2
    found = [("rect", MARGIN / 2, band.top, width - MARGIN, band.height, 10, "band", None)]
    found.append(("text", x, middle - 13, f"Level {band.level.index}", "level"))
    rate = str(band.level.frequency)
    often = {"∞": "∞, anew for every token", "0": "never updated"}.get(rate, rate)
    found.append(("text", x, middle + 5, often, "often"))
    strip, y = 126, middle + 18
    if rate == "∞":
        found.append(("rect", x, y - 4, strip, 8, 0, "muted", None))
    elif rate != "0":
        found += [
            ("line", x + strip * (i + 0.5) / band.ticks, y - 4, x + strip * (i + 0.5) / band.ticks, y + 4, "muted", 1.4)
            for i in range(band.ticks)
        ]
    found.append(("line", x, y + 4, x + strip, y + 4, "line", 1))
    return found


def _box(box: Box) -> list[tuple]:
    left, top, memory = box.x - box.width / 2, box.y - BOX_HEIGHT / 2, box.group.first
    accent = "unknown" if memory.unknown else memory.lifetime
    return [
        ("rect", left, top, box.width, BOX_HEIGHT, 7, "card", "line"),
        ("rect", left + 7, top + 9, 3, BOX_HEIGHT - 18, 1.5, accent, None),
        ("text", left + 18, top + 20, box.lines[0], "kind"),
        ("text", left + 18, top + 37, box.lines[1], "maps"),
        ("text", left + 18, top + 53, box.lines[2], "where"),
    ]


def _legend(plan: Layout) -> list[tuple]:
    x, y = MARGIN, plan.height - 50
    found: list[tuple] = []
    for kind in plan.kinds:
        found.append(("curve", [(x, y), (x + 34, y)], kind, None, None))
        found.append(("text", x + 42, y + 4, kind, "legend"))
        x += 42 + text_width(kind, 12) + 22
    x, y = MARGIN, plan.height - 24
    for lifetime in plan.lifetimes:
        found.append(("rect", x, y - 7, 3, 14, 1.5, lifetime, None))
        found.append(("text", x + 10, y + 4, LIFETIMES[lifetime], "legend"))
        x += 10 + text_width(LIFETIMES[lifetime], 12) + 22
    return found


def bends(points: list[tuple[float, float]]) -> list[tuple]:
    """Bezier pieces through the points, upright at each: (control, control, end)."""
    pieces = []
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if y0 == y1 or x0 == x1:
            pieces.append((((2 * x0 + x1) / 3, (2 * y0 + y1) / 3), ((x0 + 2 * x1) / 3, (y0 + 2 * y1) / 3), (x1, y1)))
        else:
            half = (y1 - y0) / 2
            pieces.append(((x0, y0 + half), (x1, y1 - half), (x1, y1)))
    return pieces


def style_sheet(*, variables: bool = True) -> str:
    """The classes of texts and curves, and the colours of both themes as variables."""
    light, dark = ("".join(f"--{name}:{colour};" for name, colour in theme.items()) for theme in THEMES.values())
    lines = [f"svg.levels{{{light}}}@media(prefers-color-scheme:dark){{svg.levels{{{dark}}}}}"] if variables else []
    lines.append(
        'svg.levels text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif}'
    )
    for name, (size, bold, colour) in TEXTS.items():
        lines.append(
            f"svg.levels .{name}{{font-size:{size}px;fill:var(--{colour});font-weight:{650 if bold else 400}}}"
        )
    for kind, dash in DASHES.items():
        dashes = f";stroke-dasharray:{' '.join(map(str, dash))}" if dash else ""
        lines.append(f"svg.levels .{kind}{{stroke:var(--{kind});fill:none;stroke-width:1.6{dashes}}}")
        lines.append(f"svg.levels .{kind}-head{{fill:var(--{kind})}}")
    return "".join(lines)


def to_svg(plan: Layout, *, style: bool = True) -> str:
    """The picture as SVG; without `style` its colours come from the page it stands in."""
    size = f'width="{plan.width:.0f}" height="{plan.height:.0f}" viewBox="0 0 {plan.width:.0f} {plan.height:.0f}"'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="levels" {size} role="img" '
        f'aria-label="{escape(plan.title)}: levels">'
    ]
    if style:
        out.append(f"<style>{style_sheet()}</style>")
    heads = "".join(
        f'<marker id="head-{k}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
        f'markerUnits="userSpaceOnUse" orient="auto-start-reverse">'
        f'<path class="{k}-head" d="M0 0.8L8 4L0 7.2z"/></marker>'
        for k in DASHES
    )
    out.append(f"<defs>{heads}</defs>")
    out.append(f'<rect width="{plan.width:.0f}" height="{plan.height:.0f}" rx="8" fill="var(--paper)"/>')
    out += [_svg_mark(mark) for mark in marks(plan)]
    return "".join(out) + "</svg>\n"


def _svg_mark(mark: tuple) -> str:
    kind, *rest = mark
    if kind == "group":
        key, label, inner = rest
        return f'<g class="box" data-key="{key}" aria-label="{escape(label)}">{"".join(map(_svg_mark, inner))}</g>'
    if kind == "rect":
        x, y, w, h, radius, fill, stroke = rest
        edge = f' stroke="var(--{stroke})"' if stroke else ""
        return (
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="{radius}" fill="var(--{fill})"{edge}/>'
        )
    if kind == "text":
        x, y, text, style = rest
        return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}">{escape(text)}</text>'
    if kind == "line":
        x0, y0, x1, y1, colour, width = rest
        return f'<path d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}" stroke="var(--{colour})" stroke-width="{width}"/>'
    points, name, source, target = rest
    path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    path += "".join("C" + " ".join(f"{x:.1f} {y:.1f}" for x, y in piece) for piece in bends(points))
    ends = f' data-source="{source}" data-target="{target}"' if source else ""
    return f'<path class="curve {name}" d="{path}" marker-end="url(#head-{name})"{ends}/>'


def _with_matplotlib(plan: Layout, path: Path, colours: dict[str, str]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    dots = 72
    with plt.rc_context({"font.family": "DejaVu Sans", "svg.fonttype": "none"}):
        figure = plt.figure(figsize=(plan.width / dots, plan.height / dots), facecolor=colours["paper"])
        ax = figure.add_axes((0, 0, 1, 1))
        ax.set(xlim=(0, plan.width), ylim=(plan.height, 0))
        ax.axis("off")
        for order, mark in enumerate(marks(plan)):
            _matplotlib_mark(ax, mark, colours, order)
        try:
            figure.savefig(path, dpi=dots * 1.6, facecolor=colours["paper"])
        finally:
            plt.close(figure)


def _matplotlib_mark(ax: Any, mark: tuple, colours: dict[str, str], order: int) -> None:
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
    from matplotlib.path import Path as Outline

    kind, *rest = mark
    if kind == "group":
        for inner in rest[2]:
            _matplotlib_mark(ax, inner, colours, order)
    elif kind == "rect":
        x, y, w, h, radius, fill, stroke = rest
        edge = colours[stroke] if stroke else "none"
        ax.add_patch(
            FancyBboxPatch(
                (x, y),
                w,
                h,
                boxstyle=f"round,pad=0,rounding_size={radius}",
                fc=colours[fill],
                ec=edge,
                lw=1,
                zorder=order,
            )
        )
    elif kind == "text":
        x, y, text, style = rest
        size, bold, colour = TEXTS[style]
        ax.text(
            x, y, text, fontsize=size * 0.94, weight="bold" if bold else "normal", color=colours[colour], zorder=order
        )
    elif kind == "line":
        x0, y0, x1, y1, colour, width = rest
        ax.plot([x0, x1], [y0, y1], color=colours[colour], lw=width, zorder=order)
    else:
        points, name, _, _ = rest
        corners, codes = [points[0]], [Outline.MOVETO]
        for piece in bends(points):
            corners += piece
            codes += [Outline.CURVE4] * 3
        dash = (0, DASHES[name]) if DASHES[name] else "solid"
        ax.add_patch(
            FancyArrowPatch(
                path=Outline(corners, codes),
                arrowstyle="-|>,head_length=6,head_width=3",
                color=colours[name],
                linestyle=dash,
                lw=1.6,
                zorder=order,
                capstyle="butt",
            )
        )
