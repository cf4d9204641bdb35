"""Nested Learning in PyTorch."""

from nestling.version import __version__

__all__ = ["__version__"]
