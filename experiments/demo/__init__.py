"""The demo: a small Hope and a Transformer of its size, trained side by side on real text, and a report."""

from experiments.demo.config import DemoConfig
from experiments.demo.run import Outcome, finite, run
from experiments.demo.text import own_text, standard_library
from experiments.demo.words import headline, verdict

__all__ = ["DemoConfig", "Outcome", "finite", "headline", "own_text", "run", "standard_library", "verdict"]
