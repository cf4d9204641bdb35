"""What every commit is checked with, and what only who sets NESTLING_SLOW_TESTS=1 asks for."""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest

ASKED = "NESTLING_SLOW_TESTS" in os.environ


def examples(count: int) -> int:
    """How many examples hypothesis draws: so many, or half of them."""
    return count if ASKED else -(-count // 2)


def some(names: str, chosen: list, *others: Any) -> pytest.MarkDecorator:
    """Parametrizes with these cases; with all of `others`, or their product, where slow tests are asked for."""
    every = list(itertools.product(*others)) if len(others) > 1 else list(*others)
    return pytest.mark.parametrize(names, every if ASKED else chosen)
