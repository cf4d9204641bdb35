"""Sequence layers with explicit state, and the continuum memory."""

from nestling.layers.attention import Attention
from nestling.layers.continuum import ContinuumMemory
from nestling.layers.convolution import ShortConvolution

__all__ = ["Attention", "ContinuumMemory", "ShortConvolution"]
