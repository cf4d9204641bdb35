"""Nested Learning in PyTorch: memories inside models that go on learning.

Importing this package registers Hope with the Auto classes of transformers.
"""

import importlib
import sys
from pathlib import PurePath
from typing import TYPE_CHECKING

from nestling.version import __version__

if TYPE_CHECKING:
    from nestling.continuum import stack_levels
    from nestling.levels.schedule import Level, Schedule
    from nestling.models.hope import HopeConfig, HopeForCausalLM, HopeModel

__all__ = ["HopeConfig", "HopeForCausalLM", "HopeModel", "Level", "Schedule", "__version__", "stack_levels"]

_HOMES = {
    "nestling.continuum": ("stack_levels",),
    "nestling.levels.schedule": ("Level", "Schedule"),
    "nestling.models.hope": ("HopeConfig", "HopeForCausalLM", "HopeModel"),
}


def __getattr__(name: str):
    for module, names in _HOMES.items():
        if name in names:
            globals()[name] = value = getattr(importlib.import_module(module), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# The command line answers --help at once: its commands import what they need, when they need it.
if PurePath(sys.argv[0] if sys.argv else "").stem != "nestling":
    importlib.import_module("nestling.models")
