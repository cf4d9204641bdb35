"""What a picture of a system is made of, and how wide its texts are."""

from __future__ import annotations

from dataclasses import dataclass, field

from nestling.nested_system.drawing.groups import Link, ViewGroup
from nestling.nested_system.system import NestedLevel

GUTTER, MARGIN, BOX_HEIGHT, BOX_GAP, ROW_GAP, BAND_PAD, BAND_GAP = 176, 24, 62, 22, 30, 12, 56
MIN_WIDTH, MAX_WIDTH = 620, 1040  # of the rows
_NARROW, _WIDE = set("iljtfrI.,:;'|()[] -/"), set("mwMW→∂√Σ∞@%")


def text_width(text: str, size: float, bold: bool = False) -> float:
    """About how wide a text is in DejaVu Sans, the widest of the usual fonts."""
    units = sum(0.36 if c in _NARROW else 0.9 if c in _WIDE else 0.7 if c.isupper() else 0.61 for c in text)
    return units * size * (1.14 if bold else 1.0)


def clip(text: str, size: float, width: float, bold: bool = False) -> str:
    """The text, cut with an ellipsis where it is too wide."""
    if text_width(text, size, bold) <= width:
        return text
    while text and text_width(text + "…", size, bold) > width:
        text = text[:-1]
    return text.rstrip(" ,") + "…"


@dataclass
class Box:
    """A group of memories in the picture; coordinates of its centre."""

    group: ViewGroup
    row: int
    width: float
    lines: tuple[str, str, str]
    x: float = 0.0
    y: float = 0.0


@dataclass
class Band:
    """A level in the picture: its rows of boxes, and what its margin says."""

    level: NestedLevel
    rows: list[int]
    top: float = 0.0
    height: float = 0.0
    ticks: int = 0


@dataclass
class Curve:
    """Transfers in the picture: from box (or band) to box (or band) through points."""

    link: Link
    points: list[tuple[float, float]] = field(default_factory=list)


@dataclass
class Layout:
    """The whole picture."""

    width: float
    height: float
    title: str
    subtitle: str
    boxes: list[Box]
    bands: list[Band]
    curves: list[Curve]
    kinds: list[str]  # of transfers that occur
    lifetimes: list[str]
