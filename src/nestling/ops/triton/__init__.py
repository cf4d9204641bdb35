"""The chunk forms as Triton kernels for GPUs, one memory per program: ops/chunk.py and memory/fused.py as equations.

NESTLING_TRITON=1 turns them on, for tensors on CUDA, where triton can be imported and the sizes fit; else PyTorch does
the work. NESTLING_TRITON=whole takes an MLP memory's chunk in one launch each way, which no GPU has run. They are off
by default: one round on an H100 found the MLP step right and the rule of narrow matrices faulty (docs/kernels.md).
With TRITON_INTERPRET=1 they take CPU tensors: so machines without a GPU test them.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

LONGEST = 128  # side of a tile: tokens of a chunk, inputs and outputs of a layer
NARROW = 64
INSTALLED = importlib.util.find_spec("triton") is not None
_enabled = True


def is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def is_whole() -> bool:
    """Whether a chunk of an MLP memory is one program instead of one for each of its steps."""
    return os.environ.get("NESTLING_TRITON") == "whole"


def is_available(weight: Tensor, *others: Tensor | None, sides: tuple[int, ...], tokens: int = 1) -> bool:
    """Whether the kernels take tensors like these: one GPU, float32 state, no side beyond `LONGEST`.

    Layers narrower than `NARROW` are refused at more than 32 tokens: they ended in an illegal memory access on an H100.
    """
    if not _enabled or weight.dtype != torch.float32 or not INSTALLED:
        return False
    if is_interpreted():
        fits = weight.device.type == "cpu"
    else:
        asked = os.environ.get("NESTLING_TRITON") in ("1", "whole")
        fits = weight.is_cuda and asked and (tokens <= 32 or min(sides) >= NARROW)
    alike = all(t.device == weight.device and t.dtype.itemsize <= 4 for t in others if t is not None)
    return fits and alike and min(*sides, tokens) > 0 and max(*sides, tokens) <= LONGEST


@contextmanager
def disabled() -> Iterator[None]:
    """PyTorch does the work inside: for comparing."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before
