"""The demo: a small Hope and a Transformer of its size, trained side by side on real text, and a report."""

from nestling.demo.config import DemoConfig
from nestling.demo.run import Outcome, run
from nestling.demo.text import own_text, standard_library

__all__ = ["DemoConfig", "Outcome", "own_text", "run", "standard_library"]
