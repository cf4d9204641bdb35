"""Generating text token by token, with a state that can be carried on and kept on disk."""

from nestling.generation.state import load_notes, load_state, save_state
from nestling.generation.stream import Sampling, TextGenerator

__all__ = ["Sampling", "TextGenerator", "load_notes", "load_state", "save_state"]
