"""Draws sequence, segment, chunk and batch: python docs/figures/streams.py docs/images/streams.svg"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from hope import CHUNK, LEVEL, OUTER, QUIET, TOKEN, page, text

CELL, LEFT, TOKENS = 24, 150, 26


def at(token: float) -> float:
    return LEFT + CELL * token


def span(first: int, last: int, y: float, color: str, label: str, *, open_end: bool = False) -> str:
    """A bar over tokens [first, last)."""
    dash = ' stroke-dasharray="5 4"' if open_end else ""
    return (
        f'<rect x="{at(first) + 2}" y="{y}" width="{CELL * (last - first) - 4}" height="26" rx="6" fill="{color}22" '
        f'stroke="{color}" stroke-width="2"{dash}/>' + text(at((first + last) / 2), y + 18, label, size=13)
    )


def stream(y: float, name: str, real: int) -> str:
    """One row of the batch: `real` tokens, the rest is still to come."""
    out = [text(LEFT - 14, y + 17, name, at="end", weight="600")]
    for i in range(TOKENS):
        fill = "#dfe6ee" if i < real else "none"
        out.append(f'<rect x="{at(i) + 1}" y="{y}" width="{CELL - 2}" height="{CELL}" fill="{fill}" stroke="#aab4bf"/>')
    return "\n".join(out)


def streams() -> str:
    out = [
        text(LEFT - 14, 40, "call", at="end", color=QUIET),
        span(0, 11, 22, OUTER, "model(ids[:, :11])"),
        span(11, 22, 22, OUTER, "model(more, past_key_values=cache)"),
        stream(62, "stream 0", 22),
        stream(92, "stream 1", 22),
        text(LEFT - 14, 144, "chunk (8)", at="end", color=QUIET),
        span(0, 8, 126, CHUNK, "closed"),
        span(8, 16, 126, CHUNK, "closed"),
        span(16, 22, 126, TOKEN, "open: in the cache", open_end=True),
        text(LEFT - 14, 184, "segment", at="end", color=QUIET),
        span(0, 8, 166, LEVEL, "at once"),
        span(8, 11, 166, LEVEL, "3"),
        span(11, 16, 166, LEVEL, "5"),
        span(16, 22, 166, LEVEL, "6"),
        text(30, 222, "The second call begins inside a chunk, and the chunk goes on: it closes after its 8th token, "
             "however calls are cut.", at="start", size=13, color=QUIET),
        text(30, 242, "A boundary is a place in the stream. Each stream of the batch has a state of its own.",
             at="start", size=13, color=QUIET),
    ]  # fmt: skip
    for boundary in (8, 16):
        x = at(boundary)
        out.append(
            f'<line x1="{x}" y1="56" x2="{x}" y2="198" stroke="{TOKEN}" stroke-width="1.5" stroke-dasharray="3 3"/>'
        )
    return "\n".join(out)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(streams(), 800, 262), encoding="utf-8")
