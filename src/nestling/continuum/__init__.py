"""Models that go on learning while they read: levels of fast weights over the blocks of a model (NL Sec. 7)."""

from nestling.continuum.cache import LevelsCache
from nestling.continuum.learning import merge
from nestling.continuum.stack import stack_levels

__all__ = ["LevelsCache", "merge", "stack_levels"]
