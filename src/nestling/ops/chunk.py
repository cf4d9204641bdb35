"""The generalised delta rule over one chunk of tokens, all tokens at once (decision D3 of the docs' "Maths" page).

Index 0 of every decay table is the state at the chunk's start, index t = 1..C the chunk's t-th token. With
    A[t, j] = prod_{s=j+1..t} alpha_s,   M[t, j] = prod_{s=j+1..t} mu_s,   K = A M - A      (all lower triangular)
the state after token t, started from W_0 and S_0, is (for a decay towards zero)
    W_t = A[t, 0] W_0 + K[t, 0] S_0 + sum_{j<=t} (A[t, j] d_j + K[t, j] u_j) x_j^T,      d_t = u_t - beta_t W_{t-1} x_t,
where the rows d solve one unit-lower-triangular system. Nothing is divided by a decay, so zeros are harmless. A decay
towards an anchor W* adds (1 - alpha_t) W* at each token, which sums to (1 - A[t, 0]) W*.

Everything here is a plain batch [N, ...] of memories. `chunk_forward` and `chunk_backward` are the form and its
gradient, written in place where they can be: on a CPU the time goes into memory traffic as much as into products.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nestling.ops import compiled
from nestling.ops import triton as kernels
from nestling.ops.compiled import chunk as compiled_chunk
from nestling.ops.compiled import table as compiled_table
from nestling.ops.products import products, products_by_blocks


def unrounded(function: Callable) -> Callable:
    """The function with autocast off: in the types it is given, and a backward pass in those of its forward."""

    @functools.wraps(function)
    def run(*args, **options):
        device = next((a.device.type for a in args if isinstance(a, Tensor)), None)
        if device is None or not torch.is_autocast_enabled(device):
            return function(*args, **options)
        with torch.autocast(device, enabled=False):
            return function(*args, **options)

    return run


class Decays(NamedTuple):
    """Products of decay and momentum between any two tokens of a chunk, each [..., C + 1, C + 1] or None."""

    decay: Tensor  # A
    mixed: Tensor | None  # K: what a write of token j has left in W_t through the velocity
    momentum: Tensor | None  # M


def decay_table(decay: Tensor, momentum: Tensor | None) -> Decays:
    """Decay tables A, K, M of a chunk from decay [..., C] and momentum [..., C] (None: no momentum)."""
    if decay.dim() > 1 and kernels.is_available(decay, momentum, sides=(decay.shape[-1],), tokens=decay.shape[-1]):
        from nestling.ops.triton.chunk import decay_table as by_kernels

        return Decays(*by_kernels(decay.contiguous(), None if momentum is None else momentum.contiguous()))
    if compiled.is_available(decay, momentum):
        return Decays(*_Table.apply(decay.contiguous(), None if momentum is None else momentum.contiguous()))
    return _decay_table(decay, momentum)


def _decay_table(decay: Tensor, momentum: Tensor | None) -> Decays:
    table = _Products.apply(decay)
    if momentum is None:
        return Decays(table, None, None)
    velocity = _Products.apply(momentum)
    return Decays(table, table @ velocity - table, velocity)


class _Table(torch.autograd.Function):
    """`_decay_table` by the C++ library."""

    @staticmethod
    def forward(ctx, decay, momentum):
        tables = Decays(*compiled_table.forward(decay, momentum))
        ctx.save_for_backward(decay, momentum, tables.decay, tables.momentum)
        return tuple(tables)

    @staticmethod
    @unrounded
    def backward(ctx, *grads):
        decay, momentum, *tables = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            return tuple(differentiate(_decay_table, (decay, momentum), grads, ctx.needs_input_grad))
        return compiled_table.backward(decay, momentum, *tables, *grads)


class _Products(torch.autograd.Function):
    """A[t, j] = prod_{s=j+1..t} a_s for t >= j, else 0; the gradient needs no division, so a_s = 0 is exact."""

    @staticmethod
    def forward(ctx, a: Tensor) -> Tensor:
        table = products_by_blocks(a) if a.is_cuda and a.shape[-1].bit_count() == 1 else products(a)
        ctx.save_for_backward(table)
        return table

    @staticmethod
    @unrounded
    def backward(ctx, grad: Tensor) -> Tensor:
        (table,) = ctx.saved_tensors
        # da_s = sum_{j < s <= t} grad[t, j] A[t, s] A[s - 1, j]
        through = grad @ table[..., :-1, :].transpose(-1, -2)
        return (table[..., 1:] * through).sum(-2)


class Chunk(NamedTuple):
    """One layer's weights and what a chunk of tokens does to them; a batch of N memories."""

    weight: Tensor  # W_0 [N, o, i]
    velocity: Tensor | None  # S_0 [N, o, i]
    products: Tensor | None  # W_0 x_t [N, C, o], which the caller often has already; only the erase needs it
    keys: Tensor  # x [N, C, i]
    writes: Tensor  # u [N, C, o]
    erase: Tensor | None  # beta [N, C]; None is 0: then d = u and nothing needs solving
    decay: Tensor  # A [N, C + 1, C + 1]
    mixed: Tensor | None  # K
    momentum: Tensor | None  # M
    queries: Tensor | None  # q [R, C, i], read from the last R <= N memories
    anchor: Tensor | None = None  # what the weight decays towards, [N, o, i]; None is zero


def delta_chunk(chunk: Chunk, after: bool = False) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """W and S after the chunk, and the reads W_t q_t if `after`, else W_{t-1} q_t, [R, C, o]."""
    _, tokens, outs = chunk.writes.shape
    if kernels.is_available(*chunk, sides=(outs, chunk.keys.shape[-1]), tokens=tokens):
        from nestling.ops.triton.chunk import delta_chunk as by_kernels  # triton itself is imported where it is used

        return by_kernels(Chunk(*(None if t is None else t.contiguous() for t in chunk)), after)
    return _Chunk.apply(after, *(None if t is None else t.contiguous() for t in chunk))


class _Chunk(torch.autograd.Function):
    @staticmethod
    def forward(ctx, after, *args):
        c = Chunk(*args)
        ctx.after, ctx.compiled = after, compiled.is_available(*c)
        weight, velocity, reads, *saved = (compiled_chunk.forward if ctx.compiled else chunk_forward)(c, after)
        ctx.save_for_backward(*c, *saved)
        return weight, velocity, reads

    @staticmethod
    @unrounded
    def backward(ctx, *grads):
        tensors, count = ctx.saved_tensors, len(Chunk._fields)
        args, saved = tensors[:count], tensors[count:]
        if torch.is_grad_enabled():  # a second derivative is wanted
            needed = ctx.needs_input_grad[1:]
            return None, *differentiate(lambda *a: chunk_reference(Chunk(*a), ctx.after), args, grads, needed)
        backward = compiled_chunk.backward if ctx.compiled else chunk_backward
        return None, *backward(Chunk(*args), ctx.after, *saved, *grads)


def differentiate(function, args, grads, needed) -> list[Tensor | None]:
    """Gradients of `function(*args)` by autograd, themselves differentiable; `needed` says of which arguments."""
    with torch.enable_grad():
        # views, so that an argument that depends on another one counts as given
        args = [a.view_as(a) if isinstance(a, Tensor) else a for a in args]
        outputs = function(*args)
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o is not None and g is not None]
    chosen = [i for i, n in enumerate(needed) if n]
    found = torch.autograd.grad(
        [o for o, _ in pairs], [args[i] for i in chosen], [g for _, g in pairs], create_graph=True, allow_unused=True
    )
    by_index = dict(zip(chosen, found, strict=True))
    return [by_index.get(i) for i in range(len(args))]


def solve(system: Tensor, rhs: Tensor, transposed: bool = False) -> Tensor:
    """Solve with the unit-lower-triangular system, its diagonal implied, or with its transpose.

    Written as d^T T^T = rhs^T: LAPACK counts columns first, so rows stay as they are and nothing is copied.
    """
    system = system if transposed else system.mT
    return torch.linalg.solve_triangular(system, rhs.mT, upper=not transposed, left=False, unitriangular=True).mT


def _read_rows(c: Chunk, after: bool) -> tuple[slice, slice]:
    """The memories that are read, and the rows of the tables that tell what each token's read has seen."""
    return slice(c.weight.shape[0] - c.queries.shape[0], None), slice(1, None) if after else slice(None, -1)


def chunk_reference(c: Chunk, after: bool):
    """The chunk form in plain operations."""
    a, k, m, d = c.decay, c.mixed, c.momentum, c.writes
    if c.erase is not None:
        gram, beta = c.keys @ c.keys.mT, c.erase.unsqueeze(-1)
        base = a[:, :-1, :1] * c.products
        if c.anchor is not None:
            base = base + (1 - a[:, :-1, :1]) * (c.keys @ c.anchor.mT)
        if c.velocity is not None:
            base = base + k[:, :-1, :1] * (c.keys @ c.velocity.mT) + (gram * k[:, :-1, 1:]) @ c.writes
        d = solve(beta * (gram * a[:, :-1, 1:]), c.writes - beta * base)
    left, weight, velocity = a[:, -1, 1:, None] * d, a[:, -1:, :1] * c.weight, None
    if c.anchor is not None:
        weight = weight + (1 - a[:, -1:, :1]) * c.anchor
    if c.velocity is not None:
        left = left + k[:, -1, 1:, None] * c.writes
        weight = weight + k[:, -1:, :1] * c.velocity
        velocity = m[:, -1:, :1] * c.velocity + (m[:, -1, 1:, None] * c.writes).mT @ c.keys
    weight = weight + left.mT @ c.keys
    if c.queries is None:
        return weight, velocity, None
    last, rows = _read_rows(c, after)
    scores = c.queries @ c.keys[last].mT
    reads = a[last, rows, :1] * (c.queries @ c.weight[last].mT) + (scores * a[last, rows, 1:]) @ d[last]
    if c.anchor is not None:
        reads = reads + (1 - a[last, rows, :1]) * (c.queries @ c.anchor[last].mT)
    if c.velocity is not None:
        reads = reads + k[last, rows, :1] * (c.queries @ c.velocity[last].mT)
        reads = reads + (scores * k[last, rows, 1:]) @ c.writes[last]
    return weight, velocity, reads


def chunk_forward(c: Chunk, after: bool) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """`chunk_reference` with fewer temporaries, and d for its gradient."""
    a, k, m, u, x, d = c.decay, c.mixed, c.momentum, c.writes, c.keys, c.writes
    moves = c.velocity is not None
    if c.erase is not None:
        gram, beta = torch.bmm(x, x.mT), c.erase.unsqueeze(-1)
        base = c.products * a[:, :-1, :1]
        if c.anchor is not None:
            base.addcmul_(torch.bmm(x, c.anchor.mT), 1 - a[:, :-1, :1])
        if moves:
            base.addcmul_(torch.bmm(x, c.velocity.mT), k[:, :-1, :1]).baddbmm_(gram * k[:, :-1, 1:], u)
        d = solve(gram.mul_(a[:, :-1, 1:]).mul_(beta), torch.addcmul(u, base, beta, value=-1))
    weight, velocity = c.weight * a[:, -1:, :1], None
    if c.anchor is not None:
        weight.addcmul_(c.anchor, 1 - a[:, -1:, :1])
    left = d * a[:, -1, 1:, None]
    if moves:
        weight.addcmul_(c.velocity, k[:, -1:, :1])
        velocity = (c.velocity * m[:, -1:, :1]).baddbmm_((u * m[:, -1, 1:, None]).mT, x)
        left.addcmul_(u, k[:, -1, 1:, None])
    weight.baddbmm_(left.mT, x)
    reads = None
    if c.queries is not None:
        last, rows = _read_rows(c, after)
        q, scores = c.queries, torch.bmm(c.queries, x[last].mT)
        reads = torch.bmm(q, c.weight[last].mT).mul_(a[last, rows, :1])
        if c.anchor is not None:
            reads.addcmul_(torch.bmm(q, c.anchor[last].mT), 1 - a[last, rows, :1])
        if moves:
            reads.addcmul_(torch.bmm(q, c.velocity[last].mT), k[last, rows, :1])
            reads.baddbmm_(scores * k[last, rows, 1:], u[last])
        reads.baddbmm_(scores.mul_(a[last, rows, 1:]), d[last])
    return weight, velocity, reads, d


def dot(x: Tensor, y: Tensor) -> Tensor:
    """<x_t, y_t> of every row."""
    return (x * y).sum(-1)


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """<X, Y> of every matrix of a batch, [N]."""
    return (x * y).sum((-1, -2))


def chunk_backward(c: Chunk, after: bool, d: Tensor, g_w: Tensor, g_s: Tensor | None, g_r: Tensor | None) -> Chunk:
    """Gradients of every field of the chunk, from those of the weight, the velocity and the reads.

    Write G for the gradient of W_C, g_t for that of read r_t, a_tj for A[t, j], Y for x x^T. Three lines of algebra
    (momentum and anchor add terms of the same form, with K and S_0, and with 1 - A and W*):

        W_C = a_C0 W_0 + sum_j a_Cj d_j x_j^T      gives  d_j: a_Cj G x_j      x_j: a_Cj G^T d_j     a_Cj: d_j . G x_j
        r_t = a_t0 W_0 q_t + sum_j a_tj (x_j . q_t) d_j   d_j: a_tj (x_j . q_t) g_t                  and so on for each
        (I + B (Y o A)) d = u - B base, B = diag(beta), base_t = a_(t-1)0 W_0 x_t

    The first two give the whole gradient g_d of the rows d. The third is a system T d = b, so with y = T^-T g_d
    dL = y . (db - dT d): u gets y, base gets -B y, and beta_t gets -y_t . (base + (Y o A) d)_t, which is
    -y_t . W_{t-1} x_t; Y and A get -beta_t (y_t . d_j), each times the other. Nothing is divided by a decay or by beta.
    """
    a, k, m, u, x = c.decay, c.mixed, c.momentum, c.writes, c.keys
    moves = c.velocity is not None
    g_a, g_k, g_m, g_velocity, g_q, g_anchor = torch.zeros_like(a), None, None, None, None, None

    # the state after the chunk: W' = A[C, 0] W_0 + K[C, 0] S_0 + left^T x
    xw = torch.bmm(x, g_w.mT)
    g_a[:, -1, 0] = _inner(g_w, c.weight)
    if c.anchor is not None:
        g_a[:, -1, 0] -= _inner(g_w, c.anchor)
        g_anchor = g_w * (1 - a[:, -1:, :1])
    g_a[:, -1, 1:] = dot(xw, d)
    g_weight = g_w * a[:, -1:, :1]
    left = d * a[:, -1, 1:, None]
    if moves:
        g_k, g_m = torch.zeros_like(k), torch.zeros_like(m)
        xs = torch.bmm(x, g_s.mT)
        g_k[:, -1, 0] = _inner(g_w, c.velocity)
        g_k[:, -1, 1:] = dot(xw, u)
        g_m[:, -1, 0] = _inner(g_s, c.velocity)
        g_m[:, -1, 1:] = dot(xs, u)
        g_velocity = (g_s * m[:, -1:, :1]).addcmul_(g_w, k[:, -1:, :1])
        left.addcmul_(u, k[:, -1, 1:, None])
        g_u = xs.mul_(m[:, -1, 1:, None]).addcmul_(xw, k[:, -1, 1:, None])
    g_x = torch.bmm(left, g_w)
    if moves:
        g_x.baddbmm_(torch.mul(u, m[:, -1, 1:, None], out=left), g_s)
    g_d = xw.mul_(a[:, -1, 1:, None])

    if g_r is not None and c.queries is not None:
        last, rows = _read_rows(c, after)
        q, scores, seen = c.queries, torch.bmm(c.queries, x[last].mT), a[last, rows, 1:]
        pull = torch.bmm(g_r, c.weight[last])
        g_a[last, rows, 0] += dot(pull, q)
        g_q = pull.mul_(a[last, rows, :1])
        g_weight[last].baddbmm_((g_r * a[last, rows, :1]).mT, q)
        g_d[last].baddbmm_((scores * seen).mT, g_r)
        if c.anchor is not None:
            pull = torch.bmm(g_r, c.anchor[last])
            g_a[last, rows, 0] -= dot(pull, q)
            g_q.addcmul_(pull, 1 - a[last, rows, :1])
            g_anchor[last].baddbmm_((g_r * (1 - a[last, rows, :1])).mT, q)
        rd = torch.bmm(g_r, d[last].mT)
        g_a[last, rows, 1:].addcmul_(scores, rd)
        g_scores = rd.mul_(seen)
        if moves:
            seen = k[last, rows, 1:]
            pull = torch.bmm(g_r, c.velocity[last])
            g_k[last, rows, 0] += dot(pull, q)
            g_q.addcmul_(pull, k[last, rows, :1])
            g_velocity[last].baddbmm_((g_r * k[last, rows, :1]).mT, q)
            g_u[last].baddbmm_((scores * seen).mT, g_r)
            ru = torch.bmm(g_r, u[last].mT)
            g_k[last, rows, 1:].addcmul_(scores, ru)
            g_scores.addcmul_(ru, seen)
        g_q.baddbmm_(g_scores, x[last])
        g_x[last].baddbmm_(g_scores.mT, q)

    if c.erase is None:
        g_u = g_d.add_(g_u) if moves else g_d
        return Chunk(
            weight=g_weight, velocity=g_velocity, products=None, keys=g_x, writes=g_u, erase=None, decay=g_a, mixed=g_k,
            momentum=g_m, queries=g_q, anchor=g_anchor,
        )  # fmt: skip

    # the triangular system (I + beta (gram . A)) d = u - beta base, whose right side has the gradient y
    gram, seen, beta = torch.bmm(x, x.mT), a[:, :-1, 1:], c.erase.unsqueeze(-1)
    y = solve((gram * seen).mul_(beta), g_d, transposed=True)
    yp = dot(y, c.products)
    g_erase = a[:, :-1, 0] * yp
    g_a[:, :-1, 0].sub_(c.erase * yp)
    if c.anchor is not None:
        pull, stay = torch.bmm(y, c.anchor), 1 - a[:, :-1, 0]
        yp = dot(pull, x)
        g_erase.addcmul_(stay, yp)
        g_a[:, :-1, 0].add_(c.erase * yp)
        back = (c.erase * stay).unsqueeze(-1)
        g_x.addcmul_(pull, back, value=-1)
        g_anchor.baddbmm_((y * back).mT, x, alpha=-1)
    yd = torch.bmm(y, d.mT)
    g_a[:, :-1, 1:].addcmul_(gram * beta, yd, value=-1)
    g_gram = yd.mul_(seen)
    if moves:
        seen = k[:, :-1, 1:]
        pull = torch.bmm(y, c.velocity)  # through S_0 x_t
        yp = dot(pull, x)
        g_erase.addcmul_(k[:, :-1, 0], yp)
        g_k[:, :-1, 0].sub_(c.erase * yp)
        back = beta * k[:, :-1, :1]
        g_x.addcmul_(pull, back, value=-1)
        g_velocity.baddbmm_((y * back).mT, x, alpha=-1)
        yu = torch.bmm(y, u.mT)
        g_k[:, :-1, 1:].addcmul_(gram * beta, yu, value=-1)
        g_gram.addcmul_(yu, seen)
        g_u.add_(y).baddbmm_((gram * seen).mul_(beta).mT, y, alpha=-1)
    g_erase = -g_erase.add_(dot(g_gram, gram))
    g_gram.mul_(-beta)
    g_x.baddbmm_(g_gram + g_gram.mT, x)
    g_products = y * (-beta * a[:, :-1, :1])
    return Chunk(
        weight=g_weight, velocity=g_velocity, products=g_products, keys=g_x, writes=g_u if moves else y, erase=g_erase,
        decay=g_a, mixed=g_k, momentum=g_m, queries=g_q, anchor=g_anchor,
    )  # fmt: skip
