"""The inverse of a batch of unit-lower-triangular matrices, as products: on a GPU a solve takes many times as long."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.ops.chunk import differentiate, unrounded


def unit_inverse(low: Tensor) -> Tensor:
    """(I + L)^-1 of strictly lower triangular L [M, C, C]; what stands on and above its diagonal is not looked at."""
    return _Inverse.apply(low)


def unit_inverse_reference(low: Tensor) -> Tensor:
    """The definition."""
    eye = torch.eye(low.shape[-1], dtype=low.dtype, device=low.device)
    return torch.linalg.solve_triangular(low.tril(-1) + eye, eye.expand_as(low), upper=False, unitriangular=True)


class _Inverse(torch.autograd.Function):
    """By blocks of doubling size: for the inverse X of two blocks and the part B of L between them, X - X B X.

    The product (I - L)(I + L^2)(I + L^4)... costs as much, but where keys are alike its terms leave float32.
    """

    @staticmethod
    def forward(ctx, low):
        size = low.shape[-1]
        padded = 1 << max(size - 1, 0).bit_length()
        given = F.pad(low, (0, padded - size, 0, padded - size))
        found = torch.eye(padded, dtype=low.dtype, device=low.device).repeat(low.shape[0], 1, 1)
        block = 1
        while block < padded:
            between, upper, lower, place = _quarters(given, block), *_halves(found, block), _quarters(found, block)
            place.copy_(between.neg() if block == 1 else -(lower @ between @ upper))
            block *= 2
        found = found[:, :size, :size].contiguous()
        ctx.save_for_backward(low, found)
        return found

    @staticmethod
    @unrounded
    def backward(ctx, grad):
        low, found = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            return differentiate(lambda a: (unit_inverse_reference(a),), (low,), (grad,), ctx.needs_input_grad)[0]
        return -(found.mT @ grad @ found.mT).tril_(-1)


def _pairs(x: Tensor, block: int) -> Tensor:
    """The pairs of blocks on the diagonal, [M, 2, block, 2, block, pairs], a view."""
    count = x.shape[-1] // (2 * block)
    return x.view(-1, count, 2, block, count, 2, block).diagonal(dim1=1, dim2=4)


def _quarters(x: Tensor, block: int) -> Tensor:
    """What joins the two blocks of every pair, [M, pairs, block, block]."""
    return _pairs(x, block)[:, 1, :, 0].movedim(-1, 1)


def _halves(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The two blocks of every pair."""
    pairs = _pairs(x, block)
    return pairs[:, 0, :, 0].movedim(-1, 1), pairs[:, 1, :, 1].movedim(-1, 1)
