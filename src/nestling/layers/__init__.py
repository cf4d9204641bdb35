"""Sequence layers with explicit state, and the continuum memory."""

from nestling.layers.attention import Attention
from nestling.layers.continuum import ContinuumMemory
from nestling.layers.convolution import ShortConvolution
from nestling.layers.self_modifying_titans import SelfModifyingTitans
from nestling.layers.settings import MIXERS, build_mixer

__all__ = ["MIXERS", "Attention", "ContinuumMemory", "SelfModifyingTitans", "ShortConvolution", "build_mixer"]
