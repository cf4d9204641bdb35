"""`ops.chunk`'s delta rule over one chunk, by the C++ library."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nestling.ops.compiled import run


def forward(c: NamedTuple, after: bool) -> tuple[Tensor | None, ...]:
    """Weight, velocity and reads after the chunk, then d and x x^T for `backward`; `c` is a contiguous `Chunk`."""
    total, tokens, _ = c.writes.shape
    velocity = None if c.velocity is None else torch.empty_like(c.velocity)
    reads = None if c.queries is None else c.writes.new_empty(c.queries.shape[0], *c.writes.shape[1:])
    d, gram = torch.empty_like(c.writes), c.keys.new_empty(total, tokens, tokens)
    outputs = torch.empty_like(c.weight), velocity, reads, d, gram
    run("rule_forward", c.weight.dtype, _sizes(c, after), (c, outputs), total)
    return outputs


def backward(c: NamedTuple, after: bool, d: Tensor, gram: Tensor, *grads: Tensor | None) -> list[Tensor | None]:
    """Gradients of every field of the chunk, from those of the weight, the velocity and the reads."""
    up = [*(None if g is None else g.contiguous() for g in grads), d, gram]
    found = [None if t is None else torch.zeros_like(t) for t in c]
    run("rule_backward", c.weight.dtype, _sizes(c, after), (c, up, found), c.weight.shape[0])
    return found


def _sizes(c: NamedTuple, after: bool) -> tuple[int, ...]:
    total, tokens, out = c.writes.shape
    return total, 0 if c.queries is None else c.queries.shape[0], tokens, out, c.keys.shape[-1], int(after)
