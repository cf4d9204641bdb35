"""Where everything stands in the picture of a system: levels as rows, memories as boxes, transfers as curves."""

from __future__ import annotations

import math

from nestling.nested_system.drawing.groups import Link, ViewGroup, groups, short
from nestling.nested_system.drawing.routes import curves, place
from nestling.nested_system.drawing.shapes import (
    BAND_GAP,
    BAND_PAD,
    BOX_GAP,
    BOX_HEIGHT,
    GUTTER,
    MARGIN,
    MAX_WIDTH,
    ROW_GAP,
    Band,
    Box,
    Layout,
    clip,
    text_width,
)
from nestling.nested_system.formalism import TRANSFERS
from nestling.nested_system.system import NestedSystem


def layout(system: NestedSystem) -> Layout:
    """The picture of a system."""
    found, links = groups(system, coarse=True)
    rules = {g.first.solver.rule for g in found if g.first.lifetime == "model" and g.first.solver.kind == "gradient"}
    boxes = {group.key: _box(group, named=len(rules) > 1) for group in found}
    bands, row = [], 0
    for level in system.levels:
        mine = [boxes[g.key] for g in found if g.level == level.index]
        rows = _rows(mine, links)
        for boxes_of_row in rows:
            for box in boxes_of_row:
                box.row = row
            row += 1
        bands.append(Band(level, list(range(row - len(rows), row))))
    _ticks(bands)
    levels = {row: band for band in bands for row in band.rows}
    width, routes, chains = place(links, boxes, levels)
    _heights(bands, boxes)
    drawn = curves(routes, chains, boxes, levels)
    used = {curve.link.kind for curve in drawn}
    lifetimes = [name for name in ("context", "training", "model") if any(g.first.lifetime == name for g in found)]
    title_width = text_width(system.title, 17, True) + 2 * MARGIN
    height = bands[-1].top + bands[-1].height + 84
    return Layout(
        max(GUTTER + width + MARGIN, title_width, 800),
        height,
        system.title,
        _subtitle(system),
        list(boxes.values()),
        bands,
        drawn,
        [kind for kind in TRANSFERS if kind in used],
        lifetimes,
    )


def _subtitle(system: NestedSystem) -> str:
    count, levels, cost = len(system.memories), len(system.levels), system.cost
    return (
        f"{levels} level{'s' * (levels != 1)} · {count} {'memories' if count != 1 else 'memory'} · "
        f"{short(cost.parameters)} parameters"
    )


def _box(group: ViewGroup, *, named: bool) -> Box:
    """A group's box; `named` says who trains it, where that differs."""
    memory = group.first
    names = ", ".join(name for name in group.members if not name.startswith(group.kind))
    keys = "" if memory.keys in ("—", "?") else f"{memory.keys.split(',')[0]} → "
    maps = keys + memory.values.split(",")[0].split(" = ")[0]
    title = group.kind + (f" ×{len(group.memories)}" if len(group.memories) > 1 else "")
    cost = group.cost
    size = (
        f"{short(cost.parameters)} params"
        if cost.parameters
        else f"{short(cost.state_bytes)}B"
        if cost.state_bytes
        else ""
    )
    rule = memory.solver.rule.replace(" and ", " + ") if named and cost.parameters else ""
    last = " · ".join(filter(None, [clip(names, 11, 120), size, rule]))
    width = max(text_width(title, 13, True), text_width(maps, 12), text_width(last, 11)) + 30
    width = min(max(width, 112), 244)
    lines = (clip(title, 13, width - 26, True), clip(maps, 12, width - 26), clip(last, 11, width - 26))
    return Box(group, 0, width, lines)


def _rows(boxes: list[Box], links: list[Link]) -> list[list[Box]]:
    """A level's boxes in rows no wider than the picture, those with most to say to others first."""
    busy = {box.group.key: sum(box.group.key in (l.source, l.target) for l in links) for box in boxes}
    rows: list[list[Box]] = [[]]
    total = sum(b.width + BOX_GAP for b in boxes)
    limit = total / math.ceil(total / MAX_WIDTH) + 100
    for box in sorted(boxes, key=lambda b: -busy[b.group.key]):
        if rows[-1] and sum(b.width + BOX_GAP for b in rows[-1]) + box.width > min(limit, MAX_WIDTH):
            rows.append([])
        rows[-1].append(box)
    return rows


def _ticks(bands: list[Band]) -> None:
    """Ticks in the margin: many for a fast level, few for a slow one (in order, not to scale)."""
    moving = [str(b.level.frequency) for b in bands if 0 < b.level.frequency.rate < math.inf]
    ranks = {often: rank for rank, often in enumerate(dict.fromkeys(moving))}
    for band in bands:
        if (rank := ranks.get(str(band.level.frequency))) is not None:
            band.ticks = round(26 * (3 / 26) ** (rank / max(1, len(ranks) - 1)))


def _heights(bands: list[Band], boxes: dict[str, Box]) -> None:
    y = 72.0
    for band in bands:
        band.top = y
        y += BAND_PAD
        for row in band.rows:
            for box in boxes.values():
                if box.row == row:
                    box.y = y + BOX_HEIGHT / 2
            y += BOX_HEIGHT + ROW_GAP
        y += BAND_PAD - ROW_GAP
        band.height = y - band.top
        y += BAND_GAP
