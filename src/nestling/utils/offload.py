"""Weights that accelerate keeps elsewhere (`cpu_offload`, a device map) and brings to a module for its call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def brought(module: nn.Module) -> Iterator[None]:
    """Inside, offloaded weights of every part of a module are on its device, also of parts that are never called.

    A layer whose memories are parameters of its parts uses them without a call of those parts.
    """
    parts = [part for part in module.modules() if part is not module and hasattr(part, "_hf_hook")]
    for part in parts:
        part._hf_hook.pre_forward(part)
    try:
        yield
    finally:
        for part in parts:
            part._hf_hook.post_forward(part, None)
