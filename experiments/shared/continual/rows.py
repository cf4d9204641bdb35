"""Rows of results, grouped for a report."""

from __future__ import annotations

from typing import Any

from experiments.shared.continual.study import LearnerContender, StreamJob
from experiments.shared.work import Row

Rows = dict[str, list[dict[str, Any]]]  # by contender, in the order of the seeds


def by_contender(contenders: list[LearnerContender], seeds: list[int], row: Row) -> Rows:
    """The rows of every contender that has any."""
    found = {c.name: [r for seed in seeds if (r := row(StreamJob(c.name, seed)))] for c in contenders}
    return {name: rows for name, rows in found.items() if rows}
