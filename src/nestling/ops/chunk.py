"""The generalised delta rule over one chunk of tokens, all tokens at once (decision D3 of the docs' "Maths" page).

Index 0 of every decay table is the state at the chunk's start, index t = 1..C the chunk's t-th token. With
    A[t, j] = prod_{s=j+1..t} alpha_s,   M[t, j] = prod_{s=j+1..t} mu_s,   K = A M - A      (all lower triangular)
the state after token t, started from W_0 and S_0, is
    W_t = A[t, 0] W_0 + K[t, 0] S_0 + sum_{j<=t} (A[t, j] d_j + K[t, j] u_j) x_j^T,      d_t = u_t - beta_t W_{t-1} x_t,
where the rows d solve one unit-lower-triangular system. Nothing is divided by a decay, so zeros are harmless.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Decays(NamedTuple):
    """Products of decay and momentum between any two tokens of a chunk, each [..., C + 1, C + 1] or None."""

    decay: Tensor  # A
    mixed: Tensor | None  # K: what a write of token j has left in W_t through the velocity
    momentum: Tensor | None  # M


def decay_table(decay: Tensor, momentum: Tensor | None) -> Decays:
    """Decay tables A, K, M of a chunk from decay [..., C] and momentum [..., C] (None: no momentum)."""
    table = _Products.apply(decay)
    if momentum is None:
        return Decays(table, None, None)
    velocity = _Products.apply(momentum)
    return Decays(table, table @ velocity - table, velocity)


class _Products(torch.autograd.Function):
    """A[t, j] = prod_{s=j+1..t} a_s for t >= j, else 0; the gradient needs no division, so a_s = 0 is exact."""

    @staticmethod
    def forward(ctx, a: Tensor) -> Tensor:
        size = a.shape[-1] + 1
        # factors[j, t] = a_t where t > j, else 1: a running product along t gives A^T
        later = torch.ones(size, size, dtype=torch.bool, device=a.device).triu(1)
        factors = torch.nn.functional.pad(a, (1, 0), value=1.0).unsqueeze(-2).masked_fill(~later, 1.0)
        table = factors.cumprod(-1).triu_().transpose(-1, -2).contiguous()
        ctx.save_for_backward(table)
        return table

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (table,) = ctx.saved_tensors
        # da_s = sum_{j < s <= t} grad[t, j] A[t, s] A[s - 1, j]
        through = grad @ table[..., :-1, :].transpose(-1, -2)
        return (table[..., 1:] * through).sum(-2)


class ChunkResult(NamedTuple):
    weight: Tensor
    velocity: Tensor | None
    reads: Tensor | None


class Read(NamedTuple):
    """What a read of the running state needs besides the chunk itself."""

    products: Tensor  # W_0 q_t, [..., C, o]
    velocity_products: Tensor | None  # S_0 q_t
    scores: Tensor  # q_t . x_j, [..., C, C]
    after: bool  # W_t q_t, else W_{t-1} q_t


def delta_chunk(
    weight: Tensor,
    velocity: Tensor | None,
    products: Tensor,
    velocity_products: Tensor | None,
    gram: Tensor,
    keys: Tensor,
    writes: Tensor,
    erase: Tensor,
    decays: Decays,
    read: Read | None = None,
) -> ChunkResult:
    """Advance W and S over a chunk from products the caller has already, and read at every token.

    Args:
        weight, velocity: W_0, S_0, [..., o, i].  products, velocity_products: W_0 x_t, S_0 x_t, [..., C, o].
        gram: x_t . x_j, [..., C, C], broadcastable over memories that share their keys.
        keys, writes, erase: x [..., C, i], u [..., C, o], beta [..., C].  decays: of `decay_table`, broadcastable.
    """
    args = (weight, velocity, products, velocity_products, gram, keys, writes, erase, *decays)
    extra = (read.products, read.velocity_products, read.scores) if read is not None else (None, None, None)
    return ChunkResult(*_Chunk.apply(read is not None and read.after, *args, *extra))


def _solve(system: Tensor, rhs: Tensor, transposed: bool = False) -> Tensor:
    """Solve the unit-lower-triangular system (or its transpose)."""
    if transposed:
        system = system.transpose(-1, -2)
    return torch.linalg.solve_triangular(system, rhs, upper=transposed, unitriangular=True)


def _read_part(x: Tensor, reads: Tensor) -> Tensor:
    """What belongs to the memories that are read: all, or the last of a stack [B, n, ...]."""
    return x if x.dim() < 4 or x.shape[1] == reads.shape[1] else x[:, -1:]


def _forward(after, w, s, p, ps, gram, x, u, beta, a, k, m, qw, qs, scores):
    """The chunk form in plain operations: (W', S', reads, d, system, base)."""
    base = a[..., :-1, :1] * p
    if s is not None:
        base = base + k[..., :-1, :1] * ps + (gram * k[..., :-1, 1:]) @ u
    beta = beta.unsqueeze(-1)
    system = beta * (gram * a[..., :-1, 1:])  # strictly lower; the unit diagonal is implied
    d = _solve(system, torch.addcmul(u, beta, base, value=-1))
    out = a[..., -1, 1:, None] * d
    weight = a[..., -1:, :1] * w
    velocity = None
    if s is not None:
        out = torch.addcmul(out, k[..., -1, 1:, None], u)
        weight = torch.addcmul(weight, k[..., -1:, :1], s)
        velocity = m[..., -1:, :1] * s + (m[..., -1, 1:, None] * u).transpose(-1, -2) @ x
    weight = weight + out.transpose(-1, -2) @ x
    reads = None
    if qw is not None:
        rows = slice(1, None) if after else slice(None, -1)
        reads = a[..., rows, :1] * qw + (scores * a[..., rows, 1:]) @ _read_part(d, qw)
        if s is not None:
            reads = reads + k[..., rows, :1] * qs + (scores * k[..., rows, 1:]) @ _read_part(u, qw)
    return weight, velocity, reads, d, system, base, out


class _Chunk(torch.autograd.Function):
    """`_forward` with its gradient by hand: a third of autograd's temporaries and products."""

    @staticmethod
    def forward(ctx, after, *args):
        weight, velocity, reads, d, system, base, out = _forward(after, *args)
        ctx.after = after
        ctx.save_for_backward(*args, d, system, base, out)
        return weight, velocity, reads

    @staticmethod
    def backward(ctx, g_w, g_s, g_r):
        *args, d, system, base, out = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted: let autograd do all of it
            with torch.enable_grad():
                outputs = _forward(ctx.after, *args)[:3]
            pairs = [(o, g) for o, g in zip(outputs, (g_w, g_s, g_r), strict=True) if o is not None and g is not None]
            needed = [i for i, n in enumerate(ctx.needs_input_grad[1:]) if n]
            grads = torch.autograd.grad(
                [o for o, _ in pairs], [args[i] for i in needed], [g for _, g in pairs], create_graph=True, allow_unused=True
            )
            found = dict(zip(needed, grads, strict=True))
            return None, *(found.get(i) for i in range(len(args)))
        return None, *_backward(ctx.after, args, d, system, base, out, g_w, g_s, g_r)


def _fit(grad: Tensor, like: Tensor) -> Tensor:
    """Sum over the dimensions that were broadcast."""
    return grad if grad.shape == like.shape else grad.sum_to_size(like.shape)


def _backward(after, args, d, system, base, out, g_w, g_s, g_r):
    w, s, p, ps, gram, x, u, beta, a, k, m, qw, qs, scores = args
    moves = s is not None
    beta = beta.unsqueeze(-1)
    g_a = torch.zeros(torch.broadcast_shapes(a.shape[:-2], d.shape[:-2]) + a.shape[-2:], dtype=a.dtype, device=a.device)
    g_k, g_m = (torch.zeros_like(g_a), torch.zeros_like(g_a)) if moves else (None, None)

    # the state at the chunk's end
    xw = x @ g_w.transpose(-1, -2)  # [..., C, o]
    g_d = a[..., -1, 1:, None] * xw
    g_x = out @ g_w
    g_weight = a[..., -1:, :1] * g_w
    g_a[..., -1, 0] += (g_w * w).sum((-1, -2))
    g_a[..., -1, 1:] += (xw * d).sum(-1)
    if moves:
        xs = x @ g_s.transpose(-1, -2)
        g_u = torch.addcmul(k[..., -1, 1:, None] * xw, m[..., -1, 1:, None], xs)
        g_x = g_x + (m[..., -1, 1:, None] * u) @ g_s
        g_velocity = torch.addcmul(m[..., -1:, :1] * g_s, k[..., -1:, :1], g_w)
        g_k[..., -1, 0] += (g_w * s).sum((-1, -2))
        g_k[..., -1, 1:] += (xw * u).sum(-1)
        g_m[..., -1, 0] += (g_s * s).sum((-1, -2))
        g_m[..., -1, 1:] += (xs * u).sum(-1)

    # reads on the way
    g_qw = g_qs = g_scores = None
    if g_r is not None and qw is not None:
        rows = slice(1, None) if after else slice(None, -1)
        rd = g_r @ _read_part(d, qw).transpose(-1, -2)
        _read_part(g_d, qw).add_((scores * a[..., rows, 1:]).transpose(-1, -2) @ g_r)
        g_qw = _fit(a[..., rows, :1] * g_r, qw)
        g_scores = a[..., rows, 1:] * rd
        g_a_read = _read_part(g_a, qw)
        g_a_read[..., rows, 0] += (g_r * qw).sum(-1)
        g_a_read[..., rows, 1:] += scores * rd
        if moves:
            ru = g_r @ _read_part(u, qw).transpose(-1, -2)
            _read_part(g_u, qw).add_((scores * k[..., rows, 1:]).transpose(-1, -2) @ g_r)
            g_qs = _fit(k[..., rows, :1] * g_r, qs)
            g_scores = g_scores + k[..., rows, 1:] * ru
            g_k_read = _read_part(g_k, qw)
            g_k_read[..., rows, 0] += (g_r * qs).sum(-1)
            g_k_read[..., rows, 1:] += scores * ru
        g_scores = _fit(g_scores, scores)

    # through the triangular system (I + beta (gram . A)) d = u - beta base
    y = _solve(system, g_d, transposed=True)
    z = -beta * y
    yd = z @ d.transpose(-1, -2)
    inner = a[..., :-1, 1:] * yd
    g_a[..., :-1, 1:] += gram * yd
    g_a[..., :-1, 0] += (z * p).sum(-1)
    # d/d beta = -y . (base + (gram . A) d), without dividing by beta
    g_beta = -(y * (base + (gram * a[..., :-1, 1:]) @ d)).sum(-1)
    g_ps = g_velocity_out = None
    if moves:
        yu = z @ u.transpose(-1, -2)
        inner = torch.addcmul(inner, k[..., :-1, 1:], yu)
        g_k[..., :-1, 1:] += gram * yu
        g_k[..., :-1, 0] += (z * ps).sum(-1)
        g_u = g_u + y + (gram * k[..., :-1, 1:]).transpose(-1, -2) @ z
        g_ps = k[..., :-1, :1] * z
        g_velocity_out = g_velocity
    else:
        g_u = y
    return (
        g_weight, g_velocity_out, a[..., :-1, :1] * z, g_ps, _fit(inner, gram), g_x, g_u, g_beta,
        _fit(g_a, a), None if g_k is None else _fit(g_k, k), None if g_m is None else _fit(g_m, m), g_qw, g_qs, g_scores,
    )  # fmt: skip
