"""Gradients of what all memories of a head were given: each program writes its share, one sum adds them up."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

SHARED = "keys", "values", "eta", "mu", "decay", "mixed", "momentum"


def _sizes(step: NamedTuple) -> dict[str, int]:
    return {name: getattr(step, name)[0].numel() for name in SHARED if getattr(step, name) is not None}


def width(step: NamedTuple) -> int:
    """Numbers of one share."""
    return sum(_sizes(step).values())


def unpack(shares: Tensor, step: NamedTuple) -> dict[str, Tensor]:
    """Views of each field's part of shares [..., width]."""
    sizes = _sizes(step)
    return dict(zip(sizes, shares.split(list(sizes.values()), 1), strict=True))


def add_up(shares: Tensor, groups: int) -> Tensor:
    """[G, width] from the shares of N memories."""
    return shares.view(shares.shape[0] // groups, groups, -1).sum(0) if shares.shape[0] > groups else shares
