"""`ops.unit`, by the C++ library."""

from __future__ import annotations

import torch
from torch import Tensor

from nestling.ops.compiled import run


def forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / |x| of every row [..., p], and 1 / |x| for `backward`."""
    y, scale = torch.empty_like(x), x.new_empty(x.shape[:-1])
    run("unit_forward", x.dtype, (x.shape[-1],), ((x,), (y, scale)), scale.numel())
    return y, scale


def backward(y: Tensor, scale: Tensor, g_y: Tensor) -> Tensor:
    """The gradient of x."""
    g_x = torch.empty_like(y)
    run("unit_backward", y.dtype, (y.shape[-1],), ((y, scale, g_y), (g_x, None)), scale.numel())
    return g_x
