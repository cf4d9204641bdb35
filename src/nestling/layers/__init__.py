"""Sequence layers with explicit state, and the continuum memory."""

from nestling.cms.blocks import ContinuumMemory
from nestling.layers.attention import Attention
from nestling.layers.convolution import ShortConvolution
from nestling.layers.mixers import MIXERS, build_mixer
from nestling.layers.titans import SelfModifyingTitans

__all__ = ["MIXERS", "Attention", "ContinuumMemory", "SelfModifyingTitans", "ShortConvolution", "build_mixer"]
