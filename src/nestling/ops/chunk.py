"""The generalised delta rule over one chunk of tokens, all tokens at once (decision D3 of the docs' "Maths" page).

Index 0 of every decay table is the state at the chunk's start, index t = 1..C the chunk's t-th token. With
    A[t, j] = prod_{s=j+1..t} alpha_s,   M[t, j] = prod_{s=j+1..t} mu_s,   K = A M - A      (all lower triangular)
the state after token t, started from W_0 and S_0, is
    W_t = A[t, 0] W_0 + K[t, 0] S_0 + sum_{j<=t} (A[t, j] d_j + K[t, j] u_j) x_j^T,      d_t = u_t - beta_t W_{t-1} x_t,
where the rows d solve one unit-lower-triangular system. Nothing is divided by a decay, so zeros are harmless.

Everything here is a plain batch [N, ...] of memories. `chunk_forward` and `chunk_backward` are the form and its
gradient, written in place where they can be: on a CPU the time goes into memory traffic as much as into products.
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


class Chunk(NamedTuple):
    """All that one layer's update over a chunk depends on; the caller has the products and scores already."""

    weight: Tensor  # W_0 [N, o, i]
    velocity: Tensor | None  # S_0 [N, o, i]
    products: Tensor  # W_0 x_t [N, C, o]
    velocity_products: Tensor | None  # S_0 x_t [N, C, o]
    gram: Tensor  # x_t . x_j [N, C, C]
    keys: Tensor  # x [N, C, i]
    writes: Tensor  # u [N, C, o]
    erase: Tensor  # beta [N, C]
    decay: Tensor  # A [N, C + 1, C + 1]
    mixed: Tensor | None  # K
    momentum: Tensor | None  # M
    # reads, of the last R <= N memories of the batch
    query_products: Tensor | None = None  # W_0 q_t [R, C, o]
    query_velocity_products: Tensor | None = None  # S_0 q_t [R, C, o]
    scores: Tensor | None = None  # q_t . x_j [R, C, C]


class Solved(NamedTuple):
    """What the gradient needs from the forward."""

    d: Tensor  # [N, C, o]
    base: Tensor  # W_{t-1} x_t without the chunk's own d, [N, C, o]


def delta_chunk(chunk: Chunk, after: bool = False) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """W and S behind the chunk, and the reads W_t q_t if `after`, else W_{t-1} q_t, [R, C, o]."""
    return _Chunk.apply(after, *chunk)


class _Chunk(torch.autograd.Function):
    @staticmethod
    def forward(ctx, after, *args):
        weight, velocity, reads, solved = chunk_forward(Chunk(*args), after)
        ctx.after = after
        ctx.save_for_backward(*args, *solved)
        return weight, velocity, reads

    @staticmethod
    def backward(ctx, g_w, g_s, g_r):
        *args, d, base = ctx.saved_tensors
        chunk = Chunk(*args)
        if torch.is_grad_enabled():  # a second derivative is wanted
            grads = differentiate(lambda *a: _definition(Chunk(*a), ctx.after), chunk, (g_w, g_s, g_r), ctx.needs_input_grad[1:])
            return None, *grads
        return None, *chunk_backward(chunk, ctx.after, Solved(d, base), g_w, g_s, g_r)


def differentiate(function, args, grads, needed) -> list[Tensor | None]:
    """Gradients of `function(*args)` by autograd, themselves differentiable; `needed` says of which arguments."""
    with torch.enable_grad():
        outputs = function(*args)
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o is not None and g is not None]
    chosen = [i for i, n in enumerate(needed) if n]
    found = torch.autograd.grad(
        [o for o, _ in pairs], [args[i] for i in chosen], [g for _, g in pairs], create_graph=True, allow_unused=True
    )
    by_index = dict(zip(chosen, found, strict=True))
    return [by_index.get(i) for i in range(len(args))]


def _solve(system: Tensor, rhs: Tensor, transposed: bool = False) -> Tensor:
    """Solve with the unit-lower-triangular system, its diagonal implied, or with its transpose."""
    if transposed:
        system = system.transpose(-1, -2)
    return torch.linalg.solve_triangular(system, rhs, upper=transposed, unitriangular=True)


def _definition(c: Chunk, after: bool):
    """The chunk form in plain operations."""
    a, k, m, beta = c.decay, c.mixed, c.momentum, c.erase.unsqueeze(-1)
    base = a[:, :-1, :1] * c.products
    if c.velocity is not None:
        base = base + k[:, :-1, :1] * c.velocity_products + (c.gram * k[:, :-1, 1:]) @ c.writes
    d = _solve(beta * (c.gram * a[:, :-1, 1:]), c.writes - beta * base)
    left, weight, velocity = a[:, -1, 1:, None] * d, a[:, -1:, :1] * c.weight, None
    if c.velocity is not None:
        left = left + k[:, -1, 1:, None] * c.writes
        weight = weight + k[:, -1:, :1] * c.velocity
        velocity = m[:, -1:, :1] * c.velocity + (m[:, -1, 1:, None] * c.writes).mT @ c.keys
    weight = weight + left.mT @ c.keys
    if c.query_products is None:
        return weight, velocity, None
    rows, last = slice(1, None) if after else slice(None, -1), slice(-c.scores.shape[0], None)
    reads = a[last, rows, :1] * c.query_products + (c.scores * a[last, rows, 1:]) @ d[last]
    if c.velocity is not None:
        reads = reads + k[last, rows, :1] * c.query_velocity_products
        reads = reads + (c.scores * k[last, rows, 1:]) @ c.writes[last]
    return weight, velocity, reads


def chunk_forward(c: Chunk, after: bool) -> tuple[Tensor, Tensor | None, Tensor | None, Solved]:
    """`_definition` with fewer temporaries, and what its gradient needs."""
    a, k, m, u, beta = c.decay, c.mixed, c.momentum, c.writes, c.erase.unsqueeze(-1)
    moves = c.velocity is not None
    if moves:
        base = torch.bmm(c.gram * k[:, :-1, 1:], u)
        base.addcmul_(c.velocity_products, k[:, :-1, :1]).addcmul_(c.products, a[:, :-1, :1])
    else:
        base = c.products * a[:, :-1, :1]
    d = _solve((c.gram * a[:, :-1, 1:]).mul_(beta), torch.addcmul(u, base, beta, value=-1))
    weight, velocity = c.weight * a[:, -1:, :1], None
    left = d * a[:, -1, 1:, None]
    if moves:
        left.addcmul_(u, k[:, -1, 1:, None])
        weight.addcmul_(c.velocity, k[:, -1:, :1])
        velocity = (c.velocity * m[:, -1:, :1]).baddbmm_((u * m[:, -1, 1:, None]).mT, c.keys)
    weight.baddbmm_(left.mT, c.keys)
    reads = None
    if c.query_products is not None:
        rows, last = slice(1, None) if after else slice(None, -1), slice(-c.scores.shape[0], None)
        reads = (a[last, rows, :1] * c.query_products).baddbmm_(c.scores * a[last, rows, 1:], d[last])
        if moves:
            reads.addcmul_(c.query_velocity_products, k[last, rows, :1])
            reads.baddbmm_(c.scores * k[last, rows, 1:], u[last])
    return weight, velocity, reads, Solved(d, base)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1)


def chunk_backward(
    c: Chunk, after: bool, solved: Solved, g_w: Tensor, g_s: Tensor | None, g_r: Tensor | None
) -> Chunk:
    """Gradients of every field of the chunk, from those of the weight, the velocity and the reads."""
    a, k, m, u, x, beta = c.decay, c.mixed, c.momentum, c.writes, c.keys, c.erase.unsqueeze(-1)
    d, base = solved
    moves = c.velocity is not None
    g_a = torch.zeros_like(a)
    g_k = g_m = g_qw = g_qs = g_scores = g_velocity = g_ps = None

    # the state behind the chunk: W' = A[C, 0] W_0 + K[C, 0] S_0 + left^T x
    xw = torch.bmm(x, g_w.mT)
    g_a[:, -1, 0] = (g_w * c.weight).sum((-1, -2))
    g_a[:, -1, 1:] = _dot(xw, d)
    g_weight = g_w * a[:, -1:, :1]
    left = d * a[:, -1, 1:, None]
    if moves:
        g_k, g_m = torch.zeros_like(k), torch.zeros_like(m)
        xs = torch.bmm(x, g_s.mT)
        g_k[:, -1, 0] = (g_w * c.velocity).sum((-1, -2))
        g_k[:, -1, 1:] = _dot(xw, u)
        g_m[:, -1, 0] = (g_s * c.velocity).sum((-1, -2))
        g_m[:, -1, 1:] = _dot(xs, u)
        g_velocity = (g_s * m[:, -1:, :1]).addcmul_(g_w, k[:, -1:, :1])
        left.addcmul_(u, k[:, -1, 1:, None])
        g_u = (xw * k[:, -1, 1:, None]).addcmul_(xs, m[:, -1, 1:, None])
    g_x = torch.bmm(left, g_w)
    if moves:
        g_x.baddbmm_(u * m[:, -1, 1:, None], g_s)
    g_d = xw.mul_(a[:, -1, 1:, None])

    if g_r is not None and c.query_products is not None:
        rows, last = slice(1, None) if after else slice(None, -1), slice(-c.scores.shape[0], None)
        seen = a[last, rows, 1:]
        rd = torch.bmm(g_r, d[last].mT)
        g_d[last].baddbmm_((c.scores * seen).mT, g_r)
        g_qw = g_r * a[last, rows, :1]
        g_a[last, rows, 0] += _dot(g_r, c.query_products)
        g_a[last, rows, 1:] += c.scores * rd
        g_scores = rd.mul_(seen)
        if moves:
            seen = k[last, rows, 1:]
            ru = torch.bmm(g_r, u[last].mT)
            g_u[last].baddbmm_((c.scores * seen).mT, g_r)
            g_qs = g_r * k[last, rows, :1]
            g_k[last, rows, 0] += _dot(g_r, c.query_velocity_products)
            g_k[last, rows, 1:] += c.scores * ru
            g_scores.addcmul_(ru, seen)

    # the triangular system (I + beta (gram . A)) d = u - beta base; z is the gradient of base
    y = _solve((c.gram * a[:, :-1, 1:]).mul_(beta), g_d, transposed=True)
    z = y * -beta
    seen = a[:, :-1, 1:]
    zd = torch.bmm(z, d.mT)
    g_a[:, :-1, 1:].addcmul_(c.gram, zd)
    g_a[:, :-1, 0] += _dot(z, c.products)
    # -y . (base + (gram . A) d), the erase's own gradient, without dividing by beta
    g_erase = -_dot(y, base).add_(_dot(torch.bmm(y, d.mT), c.gram * seen))
    g_gram = zd.mul_(seen)
    if moves:
        seen = k[:, :-1, 1:]
        zu = torch.bmm(z, u.mT)
        g_k[:, :-1, 1:].addcmul_(c.gram, zu)
        g_k[:, :-1, 0] += _dot(z, c.velocity_products)
        g_u.add_(y).baddbmm_((c.gram * seen).mT, z)
        g_gram.addcmul_(zu, seen)
        g_ps = z * k[:, :-1, :1]
    else:
        g_u = y
    g_products = z.mul_(a[:, :-1, :1])
    return Chunk(
        g_weight, g_velocity, g_products, g_ps, g_gram, g_x, g_u, g_erase, g_a, g_k, g_m, g_qw, g_qs, g_scores
    )
