"""Draws Hope with its clocks: python docs/figures/hope.py docs/images/hope.svg

Colours carry their own light background, so that the picture reads the same on a light and on a dark page.
"""

import sys
from pathlib import Path

WIDTH, HEIGHT = 860, 430
INK, QUIET, PAPER = "#1b2330", "#5a6675", "#fbfaf7"
# one colour a clock, fastest first
TOKEN, CHUNK, LEVEL, OUTER = "#c4472b", "#d98a1f", "#2f7f6f", "#3c5a99"


def box(x: float, y: float, w: float, h: float, color: str, lines: list[str], fill: str = "#ffffff") -> str:
    """A rounded box with centred lines of text, the first one bold."""
    out = [f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="8" fill="{fill}" stroke="{color}" stroke-width="2"/>']
    top = y + h / 2 - (len(lines) - 1) * 9 + 5
    for i, line in enumerate(lines):
        weight = "600" if i == 0 else "400"
        out.append(text(x + w / 2, top + 18 * i, line, weight=weight, color=INK if i == 0 else QUIET))
    return "\n".join(out)


def text(x: float, y: float, what: str, *, size: int = 14, weight: str = "400", color: str = INK, at: str = "middle"):
    style = f'font-size="{size}" font-weight="{weight}" fill="{color}" text-anchor="{at}"'
    return f'<text x="{x}" y="{y}" {style}>{what}</text>'


def arrow(x1: float, y1: float, x2: float, y2: float, color: str = INK) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{color}" stroke-width="2" marker-end="url(#tip)"/>'


def ticks(x: float, y: float, width: float, count: int, color: str) -> str:
    """A line of time with `count` updates on it."""
    marks = [f'<line x1="{x}" y1="{y}" x2="{x + width}" y2="{y}" stroke="{color}" stroke-width="1.5"/>']
    for i in range(1, count + 1):
        at = x + width * i / count
        marks.append(f'<line x1="{at:.1f}" y1="{y - 7}" x2="{at:.1f}" y2="{y + 7}" stroke="{color}" stroke-width="2"/>')
    return "\n".join(marks)


def hope() -> str:
    left = [
        text(30, 34, "One decoder layer of Hope", size=17, weight="600", at="start"),
        text(235, 66, "tokens in", color=QUIET),
        arrow(235, 72, 235, 94),
        '<rect x="30" y="98" width="410" height="150" rx="10" fill="#f3f0e9" stroke="#cfc8ba"/>',
        text(44, 118, "self-modifying Titans: rewrite themselves", weight="600", at="start"),
        box(
            44, 130, 190, 102, CHUNK, ["projections", "k, v, \u03b7, \u03b1 are memories:", "read at the chunk's start"]
        ),
        arrow(234, 181, 260, 181),
        box(264, 130, 162, 102, TOKEN, ["main memory", "written token by", "token, read by q"]),
        arrow(235, 248, 235, 272),
        '<rect x="30" y="276" width="410" height="112" rx="10" fill="#f3f0e9" stroke="#cfc8ba"/>',
        text(44, 296, "continuum memory: a chain of MLP blocks", weight="600", at="start"),
        box(44, 308, 120, 66, LEVEL, ["fast level", "in a context"]),
        arrow(164, 341, 180, 341),
        box(184, 308, 120, 66, "#5a8fbf", ["slow level", "across them"]),
        arrow(304, 341, 320, 341),
        box(324, 308, 102, 66, OUTER, ["MLP", "every step"]),
        arrow(235, 388, 235, 410),
        text(250, 410, "to the next layer", color=QUIET, at="start"),
    ]
    rows = [
        ("main memory", "every token", TOKEN, 24),
        ("projections", "every chunk (64 tokens)", CHUNK, 8),
        ("fast level", "every 512 tokens, say", LEVEL, 3),
        ("slow level", "every 65,536 tokens, say", "#5a8fbf", 1),
    ]
    right = [text(490, 34, "Its clocks: when each is updated", size=17, weight="600", at="start")]
    for i, (name, period, color, count) in enumerate(rows):
        y = 84 + 66 * i
        right += [text(490, y, name, weight="600", color=color, at="start")]
        right += [text(830, y, period, color=QUIET, at="end", size=13)]
        right += [ticks(490, y + 20, 340, count, color)]
    y = 84 + 66 * 4
    right += [
        text(490, y, "MLP, initial states, embeddings", weight="600", color=OUTER, at="start"),
        text(490, y + 22, "the outer loop: one step of AdamW or M3 per batch", color=QUIET, at="start", size=13),
        text(490, y + 58, "time in the stream", color=QUIET, at="start", size=13),
        arrow(624, y + 54, 824, y + 54, QUIET),
    ]
    return "\n".join(left + right)


def page(body: str, width: int = WIDTH, height: int = HEIGHT) -> str:
    """An SVG with its background, font and the tip of an arrow."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="Helvetica, Arial, sans-serif" role="img">\n'
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="6" markerHeight="6" orient="auto">'
        f'<path d="M0 0L10 5L0 10z" fill="{INK}"/></marker></defs>\n'
        f'<rect width="{width}" height="{height}" rx="12" fill="{PAPER}"/>\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(hope()), encoding="utf-8")
