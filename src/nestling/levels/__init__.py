"""Levels of a nested system: how often each part of a model is updated."""

from nestling.levels.schedule import Level, Schedule

__all__ = ["Level", "Schedule"]
