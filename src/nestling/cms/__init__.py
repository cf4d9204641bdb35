"""Models that go on learning while they read: levels of fast weights over the blocks of a model (NL Sec. 7)."""

from nestling.cms.cache import LevelsCache
from nestling.cms.learning_model import merge
from nestling.cms.stack import stack_levels

__all__ = ["LevelsCache", "merge", "stack_levels"]
