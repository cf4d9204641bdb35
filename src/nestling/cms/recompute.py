"""Parts of a computation that keep no graph: the backward pass runs them again (decision D9)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import get_device_states, set_device_states
from transformers.cache_utils import CacheLayerMixin


def recomputed(run: Callable[[Any], Any], values: Any, parameters: Sequence[Tensor]) -> Any:
    """run(values), of which only the inputs are kept for the backward pass.

    Unlike `torch.utils.checkpoint` it may itself take gradients inside.

    Args:
        run: pytree to pytree, the same whenever it is called.  parameters: what else it depends on.
    """
    flat, spec = tree_flatten(values)
    at = [i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor)]

    def again(tensors: Sequence[Tensor]) -> tuple[list[Any], Any]:
        leaves = list(flat)
        for i, tensor in zip(at, tensors, strict=True):
            leaves[i] = tensor
        return tree_flatten(run(tree_unflatten(leaves, spec)))

    tensors, shape = [flat[i] for i in at], []
    for i in at:
        flat[i] = None  # the function keeps them where autograd sees them
    found = _Again.apply(again, shape, len(at), *tensors, *parameters)
    leaves, out = shape
    tensors = iter(found)
    return tree_unflatten([next(tensors) if isinstance(leaf, _Here) else leaf for leaf in leaves], out)


def filled(layer: CacheLayerMixin, values: dict[str, Any]) -> CacheLayerMixin:
    """A cache layer of the same kind with these attributes."""
    fresh = copy.copy(layer)
    vars(fresh).update(values)
    return fresh


class _Here:
    """Where a tensor belongs."""


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx, again: Callable, shape: list, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.again, ctx.count = again, count
        ctx.devices = get_device_states(*tensors) if any(t.is_cuda for t in tensors) else ([], [])
        ctx.random, ctx.device = torch.get_rng_state(), tensors[-1].device.type
        ctx.autocast = torch.is_autocast_enabled(ctx.device), torch.get_autocast_dtype(ctx.device)
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        with torch.enable_grad():
            leaves, spec = again(_leaves(tensors[:count]))
        found = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        shape += [[_Here() if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec]
        values = tuple(t.detach() for t in found)
        ctx.mark_non_differentiable(*(v for v, t in zip(values, found) if not t.requires_grad))
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, (enabled, dtype) = ctx.saved_tensors, ctx.autocast
        inputs, parameters = _leaves(tensors[: ctx.count]), tensors[ctx.count :]
        with torch.random.fork_rng(ctx.devices[0]), torch.enable_grad():
            torch.set_rng_state(ctx.random)
            set_device_states(*ctx.devices)
            with torch.autocast(ctx.device, dtype=dtype, enabled=enabled):
                leaves, _ = ctx.again(inputs)
        found = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        pairs = [(t, g) for t, g in zip(found, grads, strict=True) if t.requires_grad and g is not None]
        wanted = [t for t in (*inputs, *parameters) if t.requires_grad]
        given = [None] * len(wanted)
        if pairs and wanted:
            outputs, weights = zip(*pairs)
            given = torch.autograd.grad(outputs, wanted, weights, allow_unused=True)
        given = iter(given)
        return None, None, None, *(next(given) if t.requires_grad else None for t in (*inputs, *parameters))


def _leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().requires_grad_(t.requires_grad) for t in tensors]
