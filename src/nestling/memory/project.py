"""Outputs of several memories of a stack for the same inputs: the projections of a self-modifying layer."""

from __future__ import annotations

import torch
from torch import Tensor

from nestling.memory.architectures import Architecture, MLPMemory
from nestling.memory.rule import forward
from nestling.ops import compiled
from nestling.ops import triton as kernels
from nestling.ops.chunk import differentiate, unrounded
from nestling.ops.compiled import read as compiled_read


def project(architecture: Architecture, weights: tuple[Tensor, ...], x: Tensor, count: int) -> tuple[Tensor, ...]:
    """Outputs of the first `count` memories of a stack for the same inputs (NL Eqs. 83-85).

    weights [n, B, H, o, i] for each layer, x [B, H, C, i], or [count, B, H, C, i] of its own for each memory; outputs
    [B, H, C, o].
    """
    if isinstance(architecture, MLPMemory) and architecture.residual:
        own = tuple(w[:count] for w in weights)
        if kernels.is_available(*own, x, sides=tuple(own[0].shape[-2:]), tokens=x.shape[-2]):
            from nestling.ops.triton.project import project as by_kernels  # triton is imported where it is used

            flat = (t.flatten(0, -3).contiguous() for t in (*own, x))
            return by_kernels(*flat).view(count, *x.shape[-4:]).unbind(0)
    if x.dim() == 5:
        return forward(architecture, tuple(w[:count] for w in weights), x).unbind(0)
    if isinstance(architecture, MLPMemory) and architecture.residual and compiled.is_available(*weights, x):
        return _Project.apply(architecture, count, x.contiguous(), *(w.contiguous() for w in weights)).unbind(0)
    return project_reference(architecture, count, x, *weights).unbind(0)


def project_reference(architecture: Architecture, count: int, x: Tensor, *weights: Tensor) -> Tensor:
    return forward(architecture, tuple(w[:count] for w in weights), x.expand(count, *x.shape))


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, architecture, count, x, w2, w1):
        y, pre = compiled_read.forward(w2.flatten(0, 2), w1.flatten(0, 2), x.flatten(0, 1), count)
        ctx.architecture, ctx.count = architecture, count
        ctx.save_for_backward(x, w2, w1, pre)
        return y.view(count, *x.shape)

    @staticmethod
    @unrounded
    def backward(ctx, g_y):
        *args, pre = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            found = differentiate(
                lambda *args: (project_reference(ctx.architecture, ctx.count, *args),),
                args,
                (g_y,),
                ctx.needs_input_grad[2:],
            )
            return None, None, *found
        x, w2, w1 = args
        flat = w2.flatten(0, 2), w1.flatten(0, 2), x.flatten(0, 1)
        g_w2, g_w1, g_x = compiled_read.backward(*flat, pre, g_y.flatten(0, 2))
        return None, None, g_x.view_as(x), g_w2.view_as(w2), g_w1.view_as(w1)
