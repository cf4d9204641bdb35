"""`ops.chunk`'s decay tables, by the C++ library."""

from __future__ import annotations

import torch
from torch import Tensor

from nestling.ops.compiled import run


def forward(decay: Tensor, momentum: Tensor | None) -> tuple[Tensor | None, ...]:
    """A, K, M [..., C + 1, C + 1] of decay and momentum [..., C]."""
    shape = (*decay.shape[:-1], decay.shape[-1] + 1, decay.shape[-1] + 1)
    moves = momentum is not None
    tables = [decay.new_empty(shape) if wanted else None for wanted in (True, moves, moves)]
    run("table_forward", decay.dtype, _sizes(decay, momentum), ((decay, momentum), tables), decay[..., 0].numel())
    return tuple(tables)


def backward(
    decay: Tensor, momentum: Tensor | None, A: Tensor, M: Tensor | None, *grads: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of decay and momentum, from those of A, K and M."""
    found = torch.empty_like(decay), None if momentum is None else torch.empty_like(momentum)
    up = A, M, *(None if g is None else g.contiguous() for g in grads)
    run("table_backward", decay.dtype, _sizes(decay, momentum), ((decay, momentum), up, found), decay[..., 0].numel())
    return found


def _sizes(decay: Tensor, momentum: Tensor | None) -> tuple[int, int]:
    return decay.shape[-1], int(momentum is not None)
