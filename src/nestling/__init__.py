"""Nested Learning in PyTorch: memories inside models that go on learning.

Importing this package registers Hope with the Auto classes of transformers.
"""

import importlib
import sys
from pathlib import PurePath
from typing import TYPE_CHECKING

from nestling.version import __version__

if TYPE_CHECKING:
    from nestling.cms import stack_levels
    from nestling.models.hope import HopeConfig, HopeForCausalLM, HopeModel
    from nestling.nested_system import levels
    from nestling.schedule import Level, Schedule

__all__ = [
    "HopeConfig", "HopeForCausalLM", "HopeModel", "Level", "Schedule", "__version__", "levels", "stack_levels",
]  # fmt: skip

_HOMES = {
    "nestling.cms": ("stack_levels",),
    "nestling.models.hope": ("HopeConfig", "HopeForCausalLM", "HopeModel"),
    "nestling.nested_system": ("levels",),
    "nestling.schedule": ("Level", "Schedule"),
}


def __getattr__(name: str):
    for module, names in _HOMES.items():
        if name in names:
            globals()[name] = value = getattr(importlib.import_module(module), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# The command line answers --help at once: its commands import what they need, when they need it. So do the processes
# that they start, which find the command's own path as their first argument.
_program = PurePath(sys.argv[0] if sys.argv else "")
_is_command = _program.stem == "nestling" or _program.parts[-2:] == ("nestling", "__main__.py")
if not _is_command and sys.orig_argv[1:3] != ["-m", "nestling"]:
    importlib.import_module("nestling.models")
