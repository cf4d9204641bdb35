"""The default rule's chunk step of linear memories, by the C++ library."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nestling.ops.compiled import run


class LinearStep(NamedTuple):
    """Arguments of a chunk step; N = n * G memories, the last G are read."""

    weight: Tensor  # [N, o, i]
    velocity: Tensor | None
    keys: Tensor  # [G, C, i]
    values: Tensor  # [G, C, i]
    queries: Tensor | None  # [G, C, i]
    eta: Tensor  # [G, C]
    mu: Tensor | None  # [G, C]
    decay: Tensor  # A [G, C + 1, C + 1]
    mixed: Tensor | None  # K
    momentum: Tensor | None  # M
    anchor: Tensor | None  # [N, o, i]


def forward(step: LinearStep, after: bool) -> tuple[tuple[Tensor | None, ...], tuple[Tensor, ...]]:
    """(weight, velocity, reads) after the chunk, and what `backward` needs."""
    total, out, _ = step.weight.shape
    groups, tokens, _ = step.keys.shape
    new = step.weight.new_empty
    velocity = None if step.velocity is None else torch.empty_like(step.velocity)
    outputs = torch.empty_like(step.weight), velocity, None if step.queries is None else new(groups, tokens, out)
    products, error, d = (new(total, tokens, out) for _ in range(3))
    saved = products, error, new(total, tokens), new(groups, tokens, tokens), d  # rate and k k^T between them
    run("linear_forward", step.weight.dtype, _sizes(step, after), (step, outputs, saved), groups)
    return outputs, saved


def backward(step: LinearStep, after: bool, saved: tuple[Tensor, ...], *grads: Tensor | None) -> list[Tensor | None]:
    """Gradients of every field of the step, from those of weight, velocity and reads."""
    grads = [None if g is None else g.contiguous() for g in grads]
    found = [None if t is None else torch.zeros_like(t) for t in step]
    run("linear_backward", step.weight.dtype, _sizes(step, after), (step, saved, grads, found), step.keys.shape[0])
    return found


def _sizes(step: LinearStep, after: bool) -> tuple[int, ...]:
    groups, tokens, inner = step.keys.shape
    return step.weight.shape[0] // groups, groups, tokens, inner, step.weight.shape[1], int(after)
