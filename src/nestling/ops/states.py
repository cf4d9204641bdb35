"""A memory from chunk to chunk, where the chunk is an affine map of it: W' = W G + H, its norm bounded."""

from __future__ import annotations

import torch
from torch import Tensor

from nestling.ops import triton as kernels
from nestling.ops.chunk import differentiate, unrounded


def bounded(weight: Tensor, limit: float) -> Tensor:
    """The weights [..., o, i], those of a larger Frobenius norm than `limit` scaled back to it."""
    if kernels.is_available(weight, sides=tuple(weight.shape[-2:])):
        from nestling.ops.triton.bounded import bounded as by_kernels  # triton itself is imported where it is used

        return by_kernels(weight, limit)
    norm = torch.linalg.vector_norm(weight.detach(), dim=(-2, -1))
    if not weight.is_cuda and bool((norm <= limit).all()):  # the usual case costs one pass
        return weight
    norm = torch.linalg.vector_norm(weight, dim=(-2, -1), keepdim=True)
    return weight * (limit / norm.clamp_min(limit))


def chunk_states_reference(weight: Tensor, keep: Tensor, add: Tensor, limit: float | None) -> Tensor:
    """The definition of `chunk_states`: one chunk after the other."""
    found = [weight]
    for g, h in zip(keep.unbind(1), add.unbind(1), strict=True):
        weight = torch.baddbmm(h, weight, g)
        if limit is not None:
            weight = bounded(weight, limit)
        found.append(weight)
    return torch.stack(found)


def chunk_states(weight: Tensor, keep: Tensor, add: Tensor, limit: float | None = None) -> Tensor:
    """Weights at the start of every chunk and after the last, [K + 1, N, o, i].

    Args:
        weight: W before the first chunk [N, o, i].  keep: G [N, K, i, i].  add: H [N, K, o, i].
        limit: bound on the Frobenius norm after every chunk.
    """
    if limit is not None and weight.is_cuda and torch.cuda.is_current_stream_capturing():
        return chunk_states_reference(weight, keep, add, limit)  # a graph cannot ask whether the bound was met
    found = _States.apply(weight, keep, add)
    if limit is not None and not bool((torch.linalg.vector_norm(found[1:].detach(), dim=(-2, -1)) <= limit).all()):
        return chunk_states_reference(weight, keep, add, limit)
    return found


class _States(torch.autograd.Function):
    """Without a bound: backward is the same loop from behind, and one product for the gradients of all G."""

    @staticmethod
    def forward(ctx, weight, keep, add):
        found = add.new_empty(add.shape[1] + 1, *weight.shape)
        found[0] = weight
        for n, (g, h) in enumerate(zip(keep.unbind(1), add.unbind(1), strict=True)):
            torch.baddbmm(h, found[n], g, out=found[n + 1])
        ctx.save_for_backward(weight, keep, add, found)
        return found

    @staticmethod
    @unrounded
    def backward(ctx, grad):
        weight, keep, add, found = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            definition = lambda w, g, h: (chunk_states_reference(w, g, h, None),)  # noqa: E731
            return tuple(differentiate(definition, (weight, keep, add), (grad,), ctx.needs_input_grad))
        grad = grad.contiguous().clone()
        for n in range(keep.shape[1] - 1, -1, -1):
            grad[n].baddbmm_(grad[n + 1], keep[:, n].mT)
        after = grad[1:].transpose(0, 1)
        return grad[0], found[:-1].transpose(0, 1).mT @ after, after
