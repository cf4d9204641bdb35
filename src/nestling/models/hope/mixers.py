"""The sequence layer a configuration names."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from nestling.layers.attention import Attention

MIXERS = {"attention": Attention}


def check_options(name: str, dim: int, num_heads: int, options: dict[str, Any]) -> None:
    """Raise ValueError for a sequence layer or an option that does not exist."""
    if name not in MIXERS:
        raise ValueError(f"mixer must be one of {', '.join(MIXERS)}; got {name!r}")
    known = [p for p in inspect.signature(MIXERS[name]).parameters if p not in ("dim", "num_heads")]
    if unknown := [option for option in options if option not in known]:
        raise ValueError(f"mixer {name!r} has no option {', '.join(unknown)}; its options are {', '.join(known)}")


def build_mixer(name: str, dim: int, num_heads: int, **options: Any) -> nn.Module:
    """The sequence layer `name`."""
    return MIXERS[name](dim, num_heads, **options)
