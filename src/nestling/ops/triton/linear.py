"""The default rule's chunk step of linear memories by the kernels: two launches forward, three backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nestling.ops.triton import shares
from nestling.ops.triton.launch import backward_linear, backward_rule, forward_linear, forward_rule

RESULTS = "weight", "velocity", "queries"  # the fields whose new values or reads a step returns
OWN = "weight", "velocity", "queries", "anchor"


class LinearSaved(NamedTuple):
    """What the backward pass keeps."""

    products: Tensor  # W k, [N, C, o]
    error: Tensor  # W k - W v
    writes: Tensor
    rate: Tensor  # [N, C]
    d: Tensor
    inverse: Tensor  # [N, C, C]


Saved = LinearSaved


def outputs(step: Any) -> tuple[tuple[Tensor, ...], LinearSaved]:
    """Places for weight, velocity, reads and for what is saved; empty where there is none."""
    total, outs, _ = step.weight.shape
    groups, tokens, _ = step.keys.shape
    new = step.weight.new_empty
    row = total, tokens, outs
    saved = LinearSaved(new(row), new(row), new(row), new(total, tokens), new(row), new(total, tokens, tokens))
    states = (new(0) if w is None else torch.empty_like(w) for w in (step.weight, step.velocity))
    return (*states, new(0) if step.queries is None else new(groups, tokens, outs)), saved


def forward(step: Any, after: bool) -> tuple[tuple[Tensor, ...], LinearSaved]:
    """(weight, velocity, reads) after the chunk; `step` is a contiguous `LinearStep`."""
    made, saved = outputs(step)
    forward_linear(step, saved[:3], saved.rate)
    forward_rule(_rule(step, saved), (*made, saved.d, saved.inverse), after, step.keys.shape[0])
    return made, saved


def backward(step: Any, after: bool, saved: LinearSaved, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of the `OWN` fields, then the sum of the shares."""
    groups, tokens, inner = step.keys.shape
    new, like = step.weight.new_empty, torch.empty_like
    up, up_s = (
        None if w is None else torch.zeros_like(w) if g is None else g.contiguous()
        for w, g in zip((step.weight, step.velocity), grads, strict=False)
    )
    g_y = None if grads[2] is None or step.queries is None else grads[2].contiguous()
    g_w, g_s, g_a = (None if t is None else like(t) for t in (step.weight, step.velocity, step.anchor))
    g_q = None if g_y is None else new(groups, tokens, inner)
    parts = new(step.weight.shape[0], shares.width(step))
    share = shares.unpack(parts, step)
    tables = share["decay"], share.get("mixed"), share.get("momentum")
    g_made, g_keys, g_u, g_e = (
        like(saved.products),
        new(parts.shape[0], tokens, inner),
        like(saved.writes),
        like(saved.rate),
    )
    backward_rule(
        _rule(step, saved), (saved.d, saved.inverse), (up, up_s, g_y),
        (g_w, g_s, g_made, g_keys, g_u, g_e, *tables, g_q, g_a), after, groups, table_stride=parts.shape[1],
    )  # fmt: skip
    backward_linear(
        step, (saved.error, saved.rate), (g_made, g_keys, g_u, g_e),
        (g_w, share["keys"], share["values"], share["eta"], share.get("mu", share["eta"])), parts.shape[1],
    )  # fmt: skip
    return g_w, g_s, g_q, g_a, shares.add_up(parts, groups)


def _rule(step: Any, saved: LinearSaved) -> tuple:
    """The delta rule as the fields of a `Chunk`."""
    return (
        step.weight, step.velocity, saved.products, step.keys, saved.writes, saved.rate, step.decay, step.mixed,
        step.momentum, step.queries, step.anchor,
    )  # fmt: skip
