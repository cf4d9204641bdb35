"""`memory.fused`'s chunk step of MLP memories by the kernels: three launches forward, four backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nestling.ops.triton import shares
from nestling.ops.triton.launch import backward_inner, backward_rule, forward_inner, forward_rule

RESULTS = "w2", "w1", "s2", "s1", "queries"  # the fields whose new values or reads a step returns
OWN = "w2", "w1", "s2", "s1", "queries", "anchor2", "anchor1"


class KernelSaved(NamedTuple):
    """What the backward pass keeps; the names are those of `fused.Saved`."""

    pre: Tensor  # W2 k, [N, C, h]
    pre_values: Tensor  # W2 v
    hidden: Tensor  # silu(W2 k)
    error: Tensor  # [N, C, p]
    pulled: Tensor  # [N, C, h]
    out: Tensor  # [N, C, p]
    sizes: Tensor  # [4, N, C]
    writes2: Tensor  # [N, C, h]
    writes1: Tensor  # [N, C, p]
    rate: Tensor  # [N, C]
    d2: Tensor  # [N, C, h]
    inverse2: Tensor  # [N, C, C]
    d1: Tensor
    inverse1: Tensor
    read: Tensor  # [G, C, h]; empty without queries


Saved = KernelSaved


def outputs(step: Any) -> tuple[tuple[Tensor, ...], KernelSaved]:
    """Places for w2, w1, s2, s1, reads and for what is saved; empty where there is none."""
    total, hidden, inner = step.w2.shape
    groups, tokens, _ = step.keys.shape
    new = step.w2.new_empty
    wide, narrow, square = (total, tokens, hidden), (total, tokens, inner), (total, tokens, tokens)
    saved = KernelSaved(
        pre=new(wide), pre_values=new(wide), hidden=new(wide), error=new(narrow), pulled=new(wide), out=new(narrow),
        sizes=new(4, total, tokens), writes2=new(wide), writes1=new(narrow), rate=new(total, tokens), d2=new(wide),
        inverse2=new(square), d1=new(narrow), inverse1=new(square),
        read=new(0) if step.queries is None else new(groups, tokens, hidden),
    )  # fmt: skip
    states = (new(0) if w is None else torch.empty_like(w) for w in (step.w2, step.w1, step.s2, step.s1))
    return (*states, new(0) if step.queries is None else new(groups, tokens, inner)), saved


def forward(step: Any, after: bool) -> tuple[tuple[Tensor, ...], KernelSaved]:
    """Weights and velocities after the chunk and the reads; `step` is a contiguous `fused.MLPStep`."""
    (w2, w1, s2, s1, reads), saved = made = outputs(step)
    groups = step.keys.shape[0]
    forward_inner(step, saved[:9], saved.rate)
    first, second = _rules(step, saved)
    forward_rule(first, (w2, s2, saved.read, saved.d2, saved.inverse2), after, groups)
    forward_rule(second, (w1, s1, reads, saved.d1, saved.inverse1), after, groups, residual=step.queries)
    return made


def backward(step: Any, after: bool, saved: KernelSaved, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of the `OWN` fields, then the sum of the shares."""
    groups, tokens, inner = step.keys.shape
    total = step.w2.shape[0]
    new, like = step.w2.new_empty, torch.empty_like
    states = (step.w2, step.w1, step.s2, step.s1)
    up2, up1, up_s2, up_s1 = (
        None if w is None else torch.zeros_like(w) if g is None else g.contiguous()
        for w, g in zip(states, grads, strict=False)
    )
    g_y = None if grads[4] is None or step.queries is None else grads[4].contiguous()
    found2, found1, found_s2, found_s1, found_a2, found_a1 = (
        None if t is None else like(t) for t in (*states, step.anchor2, step.anchor1)
    )
    parts = new(total, shares.width(step))
    share = shares.unpack(parts, step)
    tables = share["decay"], share.get("mixed"), share.get("momentum")
    g_pre, g_hidden, g_u2, g_u1 = like(saved.pre), like(saved.pre), like(saved.pre), like(saved.error)
    g_out, g_keys, g_e2, g_e1 = like(saved.out), new(total, tokens, inner), like(saved.rate), like(saved.rate)
    g_read = None if g_y is None else like(saved.read)
    g_q = None if g_y is None else new(groups, tokens, inner)
    how = dict(after=after, groups=groups, table_stride=parts.shape[1])
    first, second = _rules(step, saved)
    backward_rule(
        second, (saved.d1, saved.inverse1), (up1, up_s1, g_y),
        (found1, found_s1, g_out, g_hidden, g_u1, g_e1, *tables, g_read, found_a1), active=True, **how,
    )  # fmt: skip
    backward_rule(
        first, (saved.d2, saved.inverse2), (up2, up_s2, g_read),
        (found2, found_s2, g_pre, g_keys, g_u2, g_e2, *tables, g_q, found_a2), add=True, extra=g_y, **how,
    )  # fmt: skip
    backward_inner(
        step, (*saved[:2], *saved[3:5], saved.sizes, saved.rate),
        (g_hidden, g_keys, g_u2, g_u1, g_e2, g_e1, g_pre, g_out),
        (found2, found1, share["keys"], share["values"], share["eta"], share.get("mu", share["eta"])), parts.shape[1],
    )  # fmt: skip
    return found2, found1, found_s2, found_s1, g_q, found_a2, found_a1, shares.add_up(parts, groups)


def _rules(step: Any, saved: KernelSaved) -> tuple[tuple, tuple]:
    """The delta rule of either layer as the fields of a `Chunk`."""
    tables = step.decay, step.mixed, step.momentum
    read = None if step.queries is None else saved.read
    first = (
        step.w2, step.s2, saved.pre, step.keys, saved.writes2, saved.rate, *tables, step.queries, step.anchor2,
    )  # fmt: skip
    second = (step.w1, step.s1, saved.out, saved.hidden, saved.writes1, saved.rate, *tables, read, step.anchor1)
    return first, second
