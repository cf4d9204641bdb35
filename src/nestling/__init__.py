"""Nested Learning in PyTorch: memories inside models that go on learning.

Importing this package registers Hope with the Auto classes of transformers.
"""

from nestling.levels.schedule import Level, Schedule
from nestling.models.hope import HopeConfig, HopeForCausalLM, HopeModel
from nestling.version import __version__

__all__ = ["HopeConfig", "HopeForCausalLM", "HopeModel", "Level", "Schedule", "__version__"]
