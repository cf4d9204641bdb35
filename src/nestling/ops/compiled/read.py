"""Outputs of residual MLP memories at fixed weights, by the C++ library."""

from __future__ import annotations

import torch
from torch import Tensor

from nestling.ops.compiled import run


def forward(w2: Tensor, w1: Tensor, x: Tensor, stack: int) -> tuple[Tensor, Tensor]:
    """x + W1 silu(W2 x) of the first `stack` * G memories for x [G, C, p], and W2 x for `backward`."""
    groups, tokens, inner = x.shape
    y, pre = x.new_empty(stack * groups, tokens, inner), x.new_empty(stack * groups, tokens, w2.shape[1])
    run("read_forward", x.dtype, (stack, groups, tokens, inner, w2.shape[1]), ((w2, w1, x), (y, pre)), groups)
    return y, pre


def backward(w2: Tensor, w1: Tensor, x: Tensor, pre: Tensor, g_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of w2, w1 (zero for memories that were not asked) and x."""
    groups, tokens, inner = x.shape
    grads = torch.empty_like(w2), torch.empty_like(w1), torch.zeros_like(x)
    for g in grads[:2]:
        g[pre.shape[0] :].zero_()
    sizes = pre.shape[0] // groups, groups, tokens, inner, w2.shape[1]
    run("read_backward", x.dtype, sizes, ((w2, w1, x), (pre, g_y.contiguous()), grads), groups)
    return grads
