"""`memory.fused`'s chunk step of MLP memories by one launch each way (`whole`), as `step` does it by three and four."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nestling.ops.triton import shares
from nestling.ops.triton.launch import backward_whole, forward_whole
from nestling.ops.triton.step import OWN, RESULTS

__all__ = ["OWN", "RESULTS", "Saved", "backward", "forward", "outputs"]


class Saved(NamedTuple):
    """What the backward pass keeps; the names are those of `step.Saved`."""

    pre: Tensor  # W2 k, [N, C, h]
    error: Tensor  # [N, C, p]
    rate: Tensor  # [N, C]
    d2: Tensor  # [N, C, h]
    inverse2: Tensor  # [N, C, C]
    d1: Tensor  # [N, C, p]
    inverse1: Tensor
    read: Tensor  # [G, C, h]; empty without queries


def outputs(step: Any) -> tuple[tuple[Tensor, ...], Saved]:
    """Places for w2, w1, s2, s1, reads and for what is saved; empty where there is none."""
    total, hidden, inner = step.w2.shape
    groups, tokens, _ = step.keys.shape
    new = step.w2.new_empty
    wide, narrow, square = (total, tokens, hidden), (total, tokens, inner), (total, tokens, tokens)
    saved = Saved(
        new(wide), new(narrow), new(total, tokens), new(wide), new(square), new(narrow), new(square),
        new(0) if step.queries is None else new(groups, tokens, hidden),
    )  # fmt: skip
    states = (new(0) if w is None else torch.empty_like(w) for w in (step.w2, step.w1, step.s2, step.s1))
    return (*states, new(0) if step.queries is None else new(groups, tokens, inner)), saved


def forward(step: Any, after: bool) -> tuple[tuple[Tensor, ...], Saved]:
    """Weights and velocities after the chunk and the reads; `step` is a contiguous `fused.MLPStep`."""
    made, saved = outputs(step)
    forward_whole(step, (*made, *saved), after)
    return made, saved


def backward(step: Any, after: bool, saved: Saved, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of the `OWN` fields, then the sum of the shares."""
    groups, tokens, inner = step.keys.shape
    new, like = step.w2.new_empty, torch.empty_like
    states = (step.w2, step.w1, step.s2, step.s1)
    up = [
        None if w is None else torch.zeros_like(w) if g is None else g.contiguous()
        for w, g in zip(states, grads, strict=False)
    ]
    g_y = None if grads[4] is None or step.queries is None else grads[4].contiguous()
    w2, w1, s2, s1, anchor2, anchor1 = (None if t is None else like(t) for t in (*states, step.anchor2, step.anchor1))
    found = w2, w1, s2, s1, None if g_y is None else new(groups, tokens, inner), anchor2, anchor1
    parts = new(step.w2.shape[0], shares.width(step))
    share = shares.unpack(parts, step)
    given = [share.get(name) for name in ("keys", "values", "eta", "mu", "decay", "mixed", "momentum")]
    g_read = None if g_y is None else like(saved.read)
    backward_whole(step, saved, (*up, g_y), (*found, *given, g_read), after, parts.shape[1])
    return *found, shares.add_up(parts, groups)
