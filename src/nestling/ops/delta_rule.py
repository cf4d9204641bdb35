"""The generalised delta rule: one rank-one write per token into a matrix memory (decision D3).

    S_t = mu_t S_{t-1} + u_t x_t^T                           momentum
    W_t = W_{t-1} (alpha_t I - beta_t x_t x_t^T) + S_t        decay, erase, write
    r_t = W_t q_t                                             read

Linear attention, RetNet, DeltaNet, Gated DeltaNet, Titans' linear memory (NL Eqs. 64, 65) and every layer of a
self-modifying memory (NL Eqs. 88, 93) are settings of it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from nestling.ops.chunk import Chunk, decay_table, delta_chunk, unrounded


class DeltaRule(NamedTuple):
    """Result of the delta rule: the state after the last token, and the reads (None without queries)."""

    weight: Tensor  # [..., o, i]
    velocity: Tensor | None  # [..., o, i]; None when called without momentum and velocity
    reads: Tensor | None  # [..., T, o]


@unrounded
def delta_rule_reference(
    weight: Tensor,
    keys: Tensor,
    writes: Tensor,
    decay: Tensor,
    erase: Tensor,
    *,
    queries: Tensor | None = None,
    momentum: Tensor | None = None,
    velocity: Tensor | None = None,
    read: str = "after",
) -> DeltaRule:
    """The definition of `delta_rule`, token by token; arguments and result as there."""
    out_dtype = keys.dtype
    weight, keys, writes, decay, erase, queries, momentum, velocity = _prepare(
        weight, keys, writes, decay, erase, queries, momentum, velocity, read
    )
    reads = []
    for t in range(keys.shape[-2]):
        x, u = keys[..., t, :], writes[..., t, :]
        before = weight
        step = u.unsqueeze(-1) * x.unsqueeze(-2)
        if momentum is not None:
            step = velocity = momentum[..., t, None, None] * velocity + step
        erased = (weight @ x.unsqueeze(-1)) * x.unsqueeze(-2)
        weight = decay[..., t, None, None] * weight - erase[..., t, None, None] * erased + step
        if queries is not None:
            source = weight if read == "after" else before
            reads.append((source @ queries[..., t, :].unsqueeze(-1)).squeeze(-1))
    if queries is None:
        return DeltaRule(weight, velocity, None)
    return DeltaRule(weight, velocity, torch.stack(reads, -2).to(out_dtype) if reads else writes.to(out_dtype))


@unrounded
def delta_rule(
    weight: Tensor,
    keys: Tensor,
    writes: Tensor,
    decay: Tensor,
    erase: Tensor,
    *,
    queries: Tensor | None = None,
    momentum: Tensor | None = None,
    velocity: Tensor | None = None,
    read: str = "after",
    chunk_size: int = 64,
) -> DeltaRule:
    """The generalised delta rule in its exact chunk form: `delta_rule_reference`, a chunk of tokens at a time.

    Args:
        weight: W_0 [..., o, i].
        keys, queries: x and q [..., T, i].  writes: u [..., T, o].  decay, erase, momentum: alpha, beta, mu [..., T].
        velocity: S_0 [..., o, i], zeros if None. Without `momentum`, mu = 0.
        read: "after" returns W_t q_t, "before" W_{t-1} q_t.
        chunk_size: tokens advanced at once; it changes the speed, never the result. T need not be a multiple.

    Returns:
        (weight, velocity, reads). bf16 and float16 inputs are accumulated in, and the state returned as, float32;
        reads come in the dtype of `keys`.

    Raises:
        ValueError: shapes that do not fit, an unknown `read`, or `chunk_size` < 1.
        TypeError: a tensor that is not floating point, or float64 mixed with other types.
    """
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size must be an integer of at least 1; got {chunk_size!r}")
    out_dtype = keys.dtype
    weight, keys, writes, decay, erase, queries, momentum, velocity = _prepare(
        weight, keys, writes, decay, erase, queries, momentum, velocity, read
    )
    lead, reads = weight.shape[:-2], []
    weight, velocity, keys, writes, queries = (_flat(t, 2) for t in (weight, velocity, keys, writes, queries))
    decay, erase, momentum = (_flat(t, 1) for t in (decay, erase, momentum))
    for start in range(0, keys.shape[1], chunk_size):
        span = slice(start, start + chunk_size)
        x, q = keys[:, span], None if queries is None else queries[:, span]
        decays = decay_table(decay[:, span], None if momentum is None else momentum[:, span])
        chunk = Chunk(
            weight=weight, velocity=velocity, products=x @ weight.mT, keys=x, writes=writes[:, span],
            erase=erase[:, span], queries=q, **decays._asdict(),
        )  # fmt: skip
        weight, velocity, out = delta_chunk(chunk, read == "after")
        reads.append(out)
    weight, velocity = (None if t is None else t.view(*lead, *t.shape[1:]) for t in (weight, velocity))
    if queries is None:
        return DeltaRule(weight, velocity, None)
    out = torch.cat(reads, 1) if reads else writes
    return DeltaRule(weight, velocity, out.view(*lead, *out.shape[1:]).to(out_dtype))


def _flat(x: Tensor | None, keep: int) -> Tensor | None:
    """All leading dimensions as one; the last `keep` stay."""
    return None if x is None else x.reshape(math.prod(x.shape[:-keep]), *x.shape[-keep:])


def _prepare(weight, keys, writes, decay, erase, queries, momentum, velocity, read):
    """Check every argument and bring it to the dtype of the accumulation."""
    named = dict(weight=weight, keys=keys, writes=writes, decay=decay, erase=erase)
    optional = dict(queries=queries, momentum=momentum, velocity=velocity)
    named |= {name: value for name, value in optional.items() if value is not None}
    for name, value in named.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a floating-point tensor; got {kind}")
    if weight.dim() < 2 or keys.dim() < 2:
        raise ValueError(
            f"weight must be [..., o, i] and keys [..., T, i]; got {tuple(weight.shape)} and {tuple(keys.shape)}"
        )
    lead, tokens, (out, inp) = weight.shape[:-2], keys.shape[-2], weight.shape[-2:]
    expected = dict(
        keys=(*lead, tokens, inp), queries=(*lead, tokens, inp), writes=(*lead, tokens, out), decay=(*lead, tokens),
        erase=(*lead, tokens), momentum=(*lead, tokens), velocity=(*lead, out, inp),
    )  # fmt: skip
    for name, value in named.items():
        if name != "weight" and tuple(value.shape) != expected[name]:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, but weight {tuple(weight.shape)} and keys "
                f"{tuple(keys.shape)} ask for {expected[name]}"
            )
    if read not in ("after", "before"):
        raise ValueError(f'read must be "after" or "before"; got {read!r}')
    double = [name for name, value in named.items() if value.dtype == torch.float64]
    if double and len(double) < len(named):
        others = ", ".join(f"{n} is {v.dtype}" for n, v in named.items() if v.dtype != torch.float64)
        raise TypeError(f"{double[0]} is float64, but {others}: give all tensors the same dtype")
    dtype = torch.float64 if double else torch.float32
    if momentum is None and velocity is not None:
        momentum = torch.zeros_like(decay)
    elif momentum is not None and velocity is None:
        velocity = torch.zeros_like(weight)
    tensors = (weight, keys, writes, decay, erase, queries, momentum, velocity)
    return [None if value is None else value.to(dtype) for value in tensors]
