"""The chunk forms as Triton kernels for GPUs, one memory per program: ops/chunk.py and memory/fused.py as equations.

Chosen by device: tensors on CUDA, where triton can be imported and the sizes fit; else PyTorch does the work. With
TRITON_INTERPRET=1 they take CPU tensors, which is how machines without a GPU test them.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

LONGEST = 128  # side of a tile: tokens of a chunk, inputs and outputs of a layer
INSTALLED = importlib.util.find_spec("triton") is not None
_enabled = True


def is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def is_available(weight: Tensor, *others: Tensor | None, sides: tuple[int, ...]) -> bool:
    """Whether the kernels take tensors like these: one GPU, float32 state, no side beyond `LONGEST`."""
    device = "cpu" if is_interpreted() else "cuda"
    if not (_enabled and weight.device.type == device and weight.dtype == torch.float32 and INSTALLED):
        return False
    alike = all(t.device == weight.device and t.dtype.itemsize <= 4 for t in others if t is not None)
    return alike and min(sides) > 0 and max(sides) <= LONGEST


@contextmanager
def disabled() -> Iterator[None]:
    """PyTorch does the work inside: for comparing."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before
