"""A curve of bounded length over a stream of any length: neighbours are merged when there are too many points."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class Series:
    """Points [x, weight, mean, largest, refused]; `refused` counts values that were not finite.

    Attributes:
        limit: most points kept.  every: values that make a point.  filled: values in the last one.
    """

    limit: int = 800
    every: int = 1
    filled: int = 0
    points: list[list[float]] = field(default_factory=list)

    def add(self, x: float, value: float, weight: float = 1) -> None:
        """A value at x, which never falls."""
        good = math.isfinite(value)
        point = [x, weight, value, value, 0] if good else [x, 0, 0.0, 0.0, 1]
        if self.points and self.filled < self.every:
            self.points[-1] = _merged(self.points[-1], point)
            self.filled += 1
            return
        if len(self.points) == self.limit:
            self.points = [_merged(a, b) for a, b in zip(self.points[::2], self.points[1::2])]
            self.every *= 2
        self.points.append(point)
        self.filled = 1

    def largest(self, low: float, high: float) -> float | None:
        """The largest value at low <= x < high."""
        return max((p[3] for p in self.points if low <= p[0] < high and p[1]), default=None)


def _merged(a: list[float], b: list[float]) -> list[float]:
    weight = a[1] + b[1]
    mean = (a[1] * a[2] + b[1] * b[2]) / weight if weight else 0.0
    filled = [p[3] for p in (a, b) if p[1]]
    return [a[0], weight, mean, max(filled, default=0.0), a[4] + b[4]]
