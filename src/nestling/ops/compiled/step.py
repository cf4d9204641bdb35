"""`memory.fused`'s chunk step of MLP memories, by the C++ library."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nestling.ops.compiled import run


class CompiledSaved(NamedTuple):
    """What the backward pass keeps; the names are those of `fused.Saved`."""

    pre: Tensor  # W2 [k; v], [N, 2C, h]
    error: Tensor  # [N, C, p]
    pulled: Tensor  # [N, C, h]
    out: Tensor  # [N, C, p]
    sizes: Tensor  # [N, 5, C]
    gram2: Tensor  # k k^T, [G, C, C]
    gram1: Tensor  # h h^T, [N, C, C]
    d2: Tensor  # [N, C, h]
    d1: Tensor  # [N, C, p]
    read: Tensor | None  # [G, C, h]


def forward(step: NamedTuple, after: bool) -> tuple[tuple[Tensor | None, ...], CompiledSaved]:
    """Weights and velocities after the chunk and the reads; `step` is a contiguous `fused.MLPStep`."""
    total, hidden, inner = step.w2.shape
    groups, tokens, _ = step.keys.shape
    new = step.w2.new_empty
    read = None if step.queries is None else new(groups, tokens, hidden)
    saved = CompiledSaved(
        pre=new(total, 2 * tokens, hidden), error=new(total, tokens, inner), pulled=new(total, tokens, hidden),
        out=new(total, tokens, inner), sizes=new(total, 5, tokens), gram2=new(groups, tokens, tokens),
        gram1=new(total, tokens, tokens), d2=new(total, tokens, hidden), d1=new(total, tokens, inner), read=read,
    )  # fmt: skip
    outputs = tuple(_like(t) for t in (step.w2, step.w1, step.s2, step.s1, step.queries))
    run("step_forward", step.w2.dtype, _sizes(step, after), (step, outputs, saved), groups)
    return outputs, saved


def backward(step: NamedTuple, after: bool, saved: CompiledSaved, *grads: Tensor | None) -> list[Tensor | None]:
    """Gradients of every field of the step, from those of weights, velocities and reads."""
    grads = [None if g is None else g.contiguous() for g in grads]
    found = [  # those of weights and velocities are written, the others added to
        _like(t) if t is None or name in ("w2", "w1", "s2", "s1") else torch.zeros_like(t)
        for name, t in step._asdict().items()
    ]
    run("step_backward", step.w2.dtype, _sizes(step, after), (step, saved, grads, found), step.keys.shape[0])
    return found


def _sizes(step: NamedTuple, after: bool) -> tuple[int, ...]:
    groups, tokens, inner = step.keys.shape
    return step.w2.shape[0] // groups, groups, tokens, inner, step.w2.shape[1], int(after)


def _like(t: Tensor | None) -> Tensor | None:
    return None if t is None else torch.empty_like(t)
