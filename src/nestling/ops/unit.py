"""Rows divided by their length: keys, queries and values of a memory."""

from __future__ import annotations

import torch
from torch import Tensor

from nestling.ops import compiled
from nestling.ops.chunk import differentiate, unrounded
from nestling.ops.compiled import unit as compiled_unit
from nestling.utils.transforms import is_transformed

TINY = 1e-6  # beside the square: smooth at zero


def unit(x: Tensor) -> Tensor:
    """x / |x| over the last dimension, smooth at zero."""
    return unit_reference(x) if is_transformed() else _Unit.apply(x)


def unit_reference(x: Tensor) -> Tensor:
    """The definition."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + TINY)


class _Unit(torch.autograd.Function):
    """With g for the gradient of y = s x, s = 1 / |x|: that of x is s (g - (y . g) y)."""

    @staticmethod
    def forward(ctx, x):
        if compiled.is_available(x):
            y, scale = compiled_unit.forward(x.contiguous())
        else:
            scale = torch.rsqrt(x.square().sum(-1) + TINY)
            y = x * scale.unsqueeze(-1)
        ctx.save_for_backward(x, y, scale)
        return y

    @staticmethod
    @unrounded
    def backward(ctx, grad):
        x, y, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            return differentiate(lambda a: (unit_reference(a),), (x,), (grad,), ctx.needs_input_grad)[0]
        if compiled.is_available(y, grad):
            return compiled_unit.backward(y, scale, grad.contiguous())
        along = (y * grad).sum(-1, keepdim=True)
        return torch.addcmul(grad, y, along, value=-1).mul_(scale.unsqueeze(-1))
