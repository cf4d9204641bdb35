"""Matplotlib figures as SVG that takes its colours and letters from the page it stands in."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# a colour of the page's style sheet, as the figure code names it
INK, MUTED, LINE = "#010101", "#020202", "#030303"
HOPE_COLOUR, TRANSFORMER_COLOUR = "#040404", "#050505"
LAYER_COLOURS = ("#060606", "#070707", "#080808", "#090909")
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    LINE: "--line",
    HOPE_COLOUR: "--hope",
    TRANSFORMER_COLOUR: "--transformer",
    **{colour: f"--layer-{i}" for i, colour in enumerate(LAYER_COLOURS, 1)},
}
POINT = 72  # one unit of the SVG is one pixel of the page

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "nestling",
    "font.family": "sans-serif",
    "font.size": 12.5,
    "axes.labelsize": 12.5,
    "axes.titlesize": 13,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "ytick.major.size": 0,
    "lines.linewidth": 2,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def to_svg(figure: Figure, label: str, prefix: str) -> str:
    """The figure as an inline SVG element.

    Args:
        label: says what is seen to someone who cannot see it.
        prefix: makes the ids of this figure its own among all of the page.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", text)
    text = re.sub(r"font: ([^;\"]*?)([\d.]+px) [^;\"]*", r"font: \1\2 var(--font)", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", text)
    width, height = figure.get_size_inches() * POINT
    head = f'<svg viewBox="0 0 {width:g} {height:g}" style="max-width:{width:g}px" role="img" aria-label="{label}" '
    return re.sub(
        r"<svg [^>]*>",
        head + 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">',
        text,
        count=1,
    )
