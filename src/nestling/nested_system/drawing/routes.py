"""The ways of transfers through the picture.

Rows are ordered so that few curves cross, and a curve over several rows keeps a place of its own in each row it passes
(the method of Sugiyama, Tagawa and Toda), so that it never runs through a box.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from nestling.nested_system.drawing.groups import Link
from nestling.nested_system.drawing.shapes import BAND_PAD, BOX_GAP, BOX_HEIGHT, GUTTER, MIN_WIDTH, Band, Box, Curve

MANY = 7  # curves from one box to boxes of one level, from which on they are drawn as one to the level


def place(
    links: list[Link], boxes: dict[str, Box], levels: dict[int, Band]
) -> tuple[float, list[_Route], list[list[_Slot]]]:
    """Set every box's x, and say how wide the rows are, which routes there are and the slots each passes."""
    routes = _routes(_bundled(links, boxes, levels), boxes, levels)
    slots: list[list[_Slot]] = [[] for _ in levels]
    of_box = {key: _Slot(box.width) for key, box in boxes.items()}
    for key, box in boxes.items():
        slots[box.row].append(of_box[key])
    chains = [_chain(route, of_box, slots) for route in routes]
    _arrange(slots)
    width = _place(slots)
    for key, box in boxes.items():
        box.x = GUTTER + of_box[key].x
    return width, routes, chains


@dataclass(eq=False)
class _Slot:
    """A place in a row: a box, or where a curve passes."""

    width: float
    x: float = 0.0
    up: list[_Slot] = field(default_factory=list)
    down: list[_Slot] = field(default_factory=list)


@dataclass
class _Route:
    """A link to draw; an end is a box's key, or None for the whole band of `levels`."""

    link: Link
    source: str | None
    target: str | None
    rows: tuple[int, int]


def _bundled(
    links: list[Link], boxes: dict[str, Box], levels: dict[int, Band]
) -> list[tuple[Link, str | None, str | None, int, int]]:
    """Links; where a box deals with all boxes of a level (or with many), one with the level."""
    size = {id(band): sum(levels[b.row] is band for b in boxes.values()) for band in levels.values()}
    sides: dict[tuple, list[Link]] = defaultdict(list)
    for link in links:
        a, b = boxes[link.source], boxes[link.target]
        if levels[a.row] is levels[b.row]:
            continue
        trains = [x.group.first.lifetime == "training" for x in (a, b)]
        sides["to", link.source, id(levels[b.row]), link.kind, trains[0]].append(link)
        sides["from", link.target, id(levels[a.row]), link.kind, trains[1]].append(link)
    done: set[int] = set()
    made = []
    for (side, _, band, _, trains), some in sorted(sides.items(), key=lambda item: -len(item[1])):
        fresh = [link for link in some if id(link) not in done]
        if len(fresh) < 3 or (len(fresh) < min(size[band], MANY) and not trains):
            continue
        done.update(id(link) for link in fresh)
        one = Link(fresh[0].source, fresh[0].target, fresh[0].kind, fresh[0].what, sum(l.count for l in fresh))
        a, b = boxes[one.source], boxes[one.target]
        made.append((one, None if side == "from" else one.source, None if side == "to" else one.target, a.row, b.row))
    for link in links:
        a, b = boxes[link.source], boxes[link.target]
        if id(link) not in done and levels[a.row] is not levels[b.row]:
            made.append((link, link.source, link.target, a.row, b.row))
    return made


def _routes(bundles, boxes: dict[str, Box], levels: dict[int, Band]) -> list[_Route]:
    routes = []
    for link, source, target, a, b in bundles:
        # a band is reached at its nearest row
        if source is None:
            a = levels[a].rows[0] if levels[a].rows[0] > b else levels[a].rows[-1]
        if target is None:
            b = levels[b].rows[0] if levels[b].rows[0] > a else levels[b].rows[-1]
        routes.append(_Route(link, source, target, (a, b)))
    return routes


def _chain(route: _Route, of_box: dict[str, _Slot], slots: list[list[_Slot]]) -> list[_Slot]:
    """The slots a route passes, from its upper to its lower end; new ones where it passes a row or ends at a band."""
    (a, b) = route.rows
    top, bottom = sorted((a, b))
    upper, lower = (route.source, route.target) if a < b else (route.target, route.source)
    chain = []
    for row in range(top, bottom + 1):
        key = upper if row == top else lower if row == bottom else None
        if key is not None:
            slot = of_box[key]
        elif row in (top, bottom):
            continue  # ends at the edge of the band, straight below or above its other end
        else:
            slot = _Slot(12)
            slots[row].append(slot)
        if chain:
            chain[-1].down.append(slot)
            slot.up.append(chain[-1])
        chain.append(slot)
    return chain


def _arrange(slots: list[list[_Slot]], sweeps: int = 12) -> None:
    """Order each row by the mean place of its neighbours, down and up in turn."""
    for row in slots:
        for i, slot in enumerate(row):
            slot.x = (i + 0.5) / len(row)
    for sweep in range(sweeps):
        downward = sweep % 2 == 0
        for row in slots if downward else reversed(slots):
            means = {}
            for slot in row:
                near = (slot.up if downward else slot.down) or slot.up or slot.down
                means[id(slot)] = sum(n.x for n in near) / len(near) if near else slot.x
            row.sort(key=lambda s: means[id(s)])
            for i, slot in enumerate(row):
                slot.x = (i + 0.5) / len(row)


def _place(slots: list[list[_Slot]]) -> float:
    """Coordinates: each slot near the mean of its neighbours, none overlapping; the width taken."""
    needed = max(sum(s.width for s in row) + BOX_GAP * (len(row) - 1) for row in slots)
    width = max(needed, MIN_WIDTH)
    for row in slots:
        for slot in row:
            slot.x *= width
    for sweep in range(24):
        for row in slots if sweep % 2 == 0 else reversed(slots):
            wanted = []
            for slot in row:
                near = slot.up + slot.down
                wanted.append(sum(n.x for n in near) / len(near) if near else width / 2)
            for slot, x in zip(row, _spread(wanted, [s.width for s in row], width)):
                slot.x = x
    return width


def _spread(wanted: list[float], widths: list[float], width: float) -> list[float]:
    """Places nearest to those wanted (least squares) in this order, without overlap, inside the width."""
    offsets = [widths[0] / 2]
    for left, right in zip(widths, widths[1:]):
        offsets.append(offsets[-1] + (left + right) / 2 + BOX_GAP)
    room = width - offsets[-1] - widths[-1] / 2
    blocks: list[list[float]] = []  # pooled adjacent violators: [sum, count]
    for want, offset in zip(wanted, offsets):
        blocks.append([want - offset, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] >= blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    means = [total / count for total, count in blocks for _ in range(count)]
    return [min(max(mean, 0.0), max(room, 0.0)) + offset for mean, offset in zip(means, offsets)]


def curves(
    routes: list[_Route], chains: list[list[_Slot]], boxes: dict[str, Box], levels: dict[int, Band]
) -> list[Curve]:
    """Points of every curve, its ends spread along the edges of its boxes."""
    ends: dict[tuple[str, bool], list[tuple[float, int, bool]]] = defaultdict(list)  # box, at its top: curves
    for i, (route, chain) in enumerate(zip(routes, chains)):
        upper, lower = (route.source, route.target) if route.rows[0] < route.rows[1] else (route.target, route.source)
        other = chain[1].x if len(chain) > 1 else chain[0].x
        if upper is not None:
            ends[upper, False].append((other, i, True))
        other = chain[-2].x if len(chain) > 1 else chain[-1].x
        if lower is not None:
            ends[lower, True].append((other, i, False))
    ports: dict[tuple[int, bool], float] = {}
    for (key, _), some in ends.items():
        box = boxes[key]
        step = min(18.0, (box.width - 24) / max(1, len(some)))
        for place, (_, i, upper) in enumerate(sorted(some)):
            ports[i, upper] = box.x + (place - (len(some) - 1) / 2) * step
    found = []
    for i, (route, chain) in enumerate(zip(routes, chains)):
        top, bottom = sorted(route.rows)
        middle = [GUTTER + slot.x for slot, row in zip(_passing(route, chain), range(top + 1, bottom))]
        first = ports.get((i, True), middle[0] if middle else ports.get((i, False)))
        last = ports.get((i, False), middle[-1] if middle else ports.get((i, True)))
        points = [(first, _edge(route, boxes, levels, top, True))]
        for x, row in zip(middle, range(top + 1, bottom)):
            y = next(b.y for b in boxes.values() if b.row == row)
            points += [(x, y - BOX_HEIGHT / 2 - BAND_PAD / 2), (x, y + BOX_HEIGHT / 2 + BAND_PAD / 2)]
        points.append((last, _edge(route, boxes, levels, bottom, False)))
        found.append(Curve(route.link, points if route.rows[0] < route.rows[1] else points[::-1]))
    return found


def _passing(route: _Route, chain: list[_Slot]) -> list[_Slot]:
    """The slots between the two ends."""
    upper, lower = (route.source, route.target) if route.rows[0] < route.rows[1] else (route.target, route.source)
    return chain[(upper is not None) : len(chain) - (lower is not None)]


def _edge(route: _Route, boxes: dict[str, Box], levels: dict[int, Band], row: int, upper: bool) -> float:
    """Where a curve leaves its upper end downwards, or reaches its lower end."""
    down = route.rows[0] < route.rows[1]
    key = (route.source if down else route.target) if upper else (route.target if down else route.source)
    if key is None:
        band = levels[row]
        return band.top + band.height if upper else band.top
    return boxes[key].y + (BOX_HEIGHT / 2 if upper else -BOX_HEIGHT / 2)
