"""One chunk of the default rule on MLP memories, differentiated by hand.

`rule.advance` is the definition of what happens here for: MLP memories with residual, objective "l2", self-generated
targets, DGD, step "joint", exact meta-gradients, a chunk that begins at its start. A test ties the two in float64,
values and gradients. By hand the backward pass needs a third of autograd's memory traffic, which is what it costs.

Memories are one batch [N, ...], N = n * G: n stacked memories of the G = B * H heads; the last G are read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.memory.architectures import Architecture, MLPMemory
from nestling.memory.rule import Context, FastWeights, Rule, advance, joint_step
from nestling.ops.chunk import Chunk, Decays, Solved, chunk_backward, chunk_forward, differentiate


def is_fused(architecture: Architecture, rule: Rule) -> bool:
    """Whether `fused_advance` stands for `rule.advance` with these settings."""
    mlp = isinstance(architecture, MLPMemory) and architecture.residual
    return mlp and rule == Rule()


def fused_advance(
    architecture: Architecture, rule: Rule, fast: FastWeights, context: Context, queries: Tensor | None, after: bool
) -> tuple[FastWeights, Tensor | None, None]:
    """`rule.advance` for a chunk from its start (`fresh`), without a report."""
    (w2, w1), velocity, lead = fast.now, fast.velocity or (None, None), fast.now[0].shape[:3]
    heads = (context.keys, context.values, queries, context.rate, context.momentum, *context.decays)
    step = Step(
        *(None if w is None else w.flatten(0, 2) for w in (w2, w1, *velocity)),
        *(None if t is None else t.flatten(0, 1) for t in heads),
    )

    def definition(*args):
        """The same by `rule.advance`, for second derivatives."""
        s = Step(*args)
        stack = [None if w is None else w.view(*lead, *w.shape[1:]) for w in s[:4]]
        k, v, q, eta, mu, *tables = (None if t is None else t.view(*lead[1:], *t.shape[1:]) for t in s[4:])
        weights = FastWeights(tuple(stack[:2]), tuple(stack[:2]), tuple(stack[2:]) if fast.velocity else ())
        new, reads, _ = advance(
            architecture, rule, weights, Context(k, v, eta, None, mu, Decays(*tables)), fresh=True, queries=q, after=after
        )
        out = (*new.now, *(new.velocity or (None, None)))
        return (*(None if w is None else w.flatten(0, 2) for w in out), None if reads is None else reads.flatten(0, 1))

    w2, w1, s2, s1, reads = _Step.apply(definition, after, *step)
    now = w2.view(*lead, *w2.shape[1:]), w1.view(*lead, *w1.shape[1:])
    velocity = (s2.view_as(now[0]), s1.view_as(now[1])) if fast.velocity else ()
    return FastWeights(fast.start, now, velocity), None if reads is None else reads.view_as(queries), None


class Step(NamedTuple):
    """Arguments of a chunk step; layer 2 is the first layer (W2), layer 1 the second, as in NL Eq. 89."""

    w2: Tensor  # [N, h, p]
    w1: Tensor  # [N, p, h]
    s2: Tensor | None
    s1: Tensor | None
    keys: Tensor  # [G, C, p]
    values: Tensor  # [G, C, p]
    queries: Tensor | None  # [G, C, p]
    eta: Tensor  # [G, C]
    mu: Tensor | None  # [G, C]
    decay: Tensor  # A [G, C + 1, C + 1]
    mixed: Tensor | None  # K
    momentum: Tensor | None  # M


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, definition, after, *args):
        step = Step(*args)
        ctx.definition, ctx.after = definition, after
        outputs, saved = _forward(step, after)
        ctx.save_for_backward(*args, *saved)
        return outputs

    @staticmethod
    def backward(ctx, *grads):
        args, saved = ctx.saved_tensors[: len(Step._fields)], ctx.saved_tensors[len(Step._fields) :]
        if torch.is_grad_enabled():  # a second derivative is wanted
            return None, None, *differentiate(ctx.definition, args, grads, ctx.needs_input_grad[2:])
        return None, None, *_backward(Step(*args), ctx.after, _Saved(*saved), *grads)


class _Saved(NamedTuple):
    pre: Tensor  # W2 [k; v], [N, 2C, h]
    hidden: Tensor  # silu of it
    error: Tensor  # M(k) - M(v), [N, C, p]
    pulled: Tensor  # W1^T error, [N, C, h]
    d2: Tensor
    base2: Tensor
    d1: Tensor
    base1: Tensor
    read: Tensor | None  # W2's read of q, [G, C, h]


def _slope(pre: Tensor, out: Tensor) -> Tensor:
    """silu' from the pre-activation and silu of it."""
    s = torch.sigmoid(pre)
    return torch.addcmul(s, s, pre - out)


def _curve_(grad: Tensor, pre: Tensor) -> Tensor:
    """grad * silu''(pre), in place on grad."""
    s = torch.sigmoid(pre)
    bend = (1 - 2 * s).mul_(pre).add_(2)
    return grad.mul_(bend).mul_(s.addcmul_(s, s, value=-1))


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1)


class _Parts(NamedTuple):
    """Cheap quantities both passes build anew."""

    rows: Tensor  # [k; v] for every memory, [N, 2C, p]
    slope: Tensor  # silu'(W2 k), [N, C, h]
    error2: Tensor  # error at the first layer, [N, C, h]
    sizes: tuple[Tensor, Tensor, Tensor, Tensor]  # |h|^2, |k|^2, |error|^2 + eps, |error2|^2, [N, C]
    eta: Tensor
    rate: Tensor  # e [N, C]
    damp: Tensor | float  # 1 - mu
    tables: tuple[Tensor, Tensor | None, Tensor | None]


def _parts(step: Step, rows: Tensor, pre: Tensor, hidden: Tensor, error: Tensor, pulled: Tensor) -> _Parts:
    n, size = step.w2.shape[0] // step.keys.shape[0], step.keys.shape[1]
    h = hidden[:, :size]
    slope = _slope(pre[:, :size], h)
    error2 = pulled * slope
    key_size = _dot(step.keys, step.keys).repeat(n, 1)
    sizes = _dot(h, h), key_size, _dot(error, error), _dot(error2, error2)
    eta = step.eta.repeat(n, 1)
    rate, total = joint_step(eta, [sizes[1], sizes[0]], [sizes[3], sizes[2]])
    damp = 1.0 if step.mu is None else (1 - step.mu).repeat(n, 1)
    tables = tuple(None if t is None else t.repeat(n, 1, 1) for t in (step.decay, step.mixed, step.momentum))
    return _Parts(rows, slope, error2, (sizes[0], sizes[1], total, sizes[3]), eta, rate, damp, tables)


def _chunks(step: Step, saved: _Saved, parts: _Parts) -> tuple[Chunk, Chunk]:
    """The delta rule of either layer, without reads."""
    n, size = step.w2.shape[0] // step.keys.shape[0], step.keys.shape[1]
    keys, h = parts.rows[:, :size], saved.hidden[:, :size]
    scale = (-parts.rate * parts.damp).unsqueeze(-1)
    gram = torch.bmm(step.keys, step.keys.mT).repeat(n, 1, 1)
    out = torch.bmm(h, step.w1.mT)
    moves = step.s2 is not None
    pulls = (torch.bmm(keys, step.s2.mT), torch.bmm(h, step.s1.mT)) if moves else (None, None)
    first = Chunk(
        step.w2, step.s2, saved.pre[:, :size], pulls[0], gram, keys, parts.error2 * scale, parts.rate, *parts.tables
    )
    second = Chunk(
        step.w1, step.s1, out, pulls[1], torch.bmm(h, h.mT), h, saved.error * scale, parts.rate, *parts.tables
    )
    return first, second


def _with_reads(chunk: Chunk, q: Tensor) -> Chunk:
    last = slice(-q.shape[0], None)
    pull = None if chunk.velocity is None else torch.bmm(q, chunk.velocity[last].mT)
    return chunk._replace(
        query_products=torch.bmm(q, chunk.weight[last].mT),
        query_velocity_products=pull,
        scores=torch.bmm(q, chunk.keys[last].mT),
    )


def _forward(step: Step, after: bool):
    n, size = step.w2.shape[0] // step.keys.shape[0], step.keys.shape[1]
    rows = torch.cat([step.keys, step.values], 1).repeat(n, 1, 1)
    pre = torch.bmm(rows, step.w2.mT)
    hidden = F.silu(pre)
    out = torch.bmm(hidden, step.w1.mT).add_(rows)  # the residual
    error = out[:, :size] - out[:, size:]
    pulled = torch.bmm(error, step.w1)
    parts = _parts(step, rows, pre, hidden, error, pulled)
    saved = _Saved(pre, hidden, error, pulled, *[None] * 5)
    first, second = _chunks(step, saved, parts)
    q, read, y = step.queries, None, None
    w2, s2, read, solved2 = chunk_forward(first if q is None else _with_reads(first, q), after)
    w1, s1, y, solved1 = chunk_forward(second if q is None else _with_reads(second, F.silu(read)), after)
    saved = saved._replace(d2=solved2.d, base2=solved2.base, d1=solved1.d, base1=solved1.base, read=read)
    return (w2, w1, s2, s1, None if q is None else y.add_(q)), saved


def _read_backward(chunk: Chunk, g: Chunk, q: Tensor) -> Tensor:
    """Gradient of the queries; what reaches the weights and keys is added to g in place."""
    last = slice(-q.shape[0], None)
    g_q = torch.bmm(g.query_products, chunk.weight[last])
    g_q.baddbmm_(g.scores, chunk.keys[last])
    g.weight[last].baddbmm_(g.query_products.mT, q)
    g.keys[last].baddbmm_(g.scores.mT, q)
    if chunk.velocity is not None:
        g_q.baddbmm_(g.query_velocity_products, chunk.velocity[last])
        g.velocity[last].baddbmm_(g.query_velocity_products.mT, q)
    return g_q


def _key_backward(chunk: Chunk, g: Chunk):
    """What Gram matrix and velocity products send to the keys and the velocity, added to g in place."""
    g.keys.baddbmm_(g.gram + g.gram.mT, chunk.keys)
    if chunk.velocity is not None:
        g.keys.baddbmm_(g.velocity_products, chunk.velocity)
        g.velocity.baddbmm_(g.velocity_products.mT, chunk.keys)


def _backward(step: Step, after: bool, saved: _Saved, g_w2, g_w1, g_s2, g_s1, g_y):
    groups, size = step.keys.shape[:2]
    n = step.w2.shape[0] // groups
    rows = torch.cat([step.keys, step.values], 1).repeat(n, 1, 1)
    parts = _parts(step, rows, saved.pre, saved.hidden, saved.error, saved.pulled)
    first, second = _chunks(step, saved, parts)
    q, g_q = step.queries, None
    if q is not None:
        hidden_q = F.silu(saved.read)
        first, second = _with_reads(first, q), _with_reads(second, hidden_q)

    # the recurrences, second layer first: its read is the last thing computed
    g1 = chunk_backward(second, after, Solved(saved.d1, saved.base1), g_w1, g_s1, g_y)
    g_read = None
    if q is not None:
        g_read = _read_backward(second, g1, hidden_q).mul_(_slope(saved.read, hidden_q))
    g2 = chunk_backward(first, after, Solved(saved.d2, saved.base2), g_w2, g_s2, g_read)
    if q is not None:
        g_q = _read_backward(first, g2, q).add_(g_y)
    _key_backward(second, g1)
    _key_backward(first, g2)
    g_h, g_k = g1.keys, g2.keys

    # writes u = -e (1 - mu) error, erase e
    reach = _dot(g1.writes, saved.error).add_(_dot(g2.writes, parts.error2))
    g_rate = g1.erase.add_(g2.erase) - reach * parts.damp
    scale = (-parts.rate * parts.damp).unsqueeze(-1)
    g_error, g_error2 = g1.writes.mul_(scale), g2.writes.mul_(scale)
    # e = eta / (1 + eta kappa), kappa = |h|^2 + |k|^2 (1 + |error2|^2 / |error|^2)
    _, key_size, total, size2 = parts.sizes
    ratio = size2 / total
    g_kappa = (-parts.rate.square() * g_rate).unsqueeze(-1)
    g_eta = g_rate / (1 + parts.eta * (parts.sizes[0] + key_size * (1 + ratio))).square()
    h, keys = saved.hidden[:, :size], rows[:, :size]
    g_h.addcmul_(h, 2 * g_kappa)
    g_k.addcmul_(keys, 2 * g_kappa * (1 + ratio).unsqueeze(-1))
    g_ratio = g_kappa * (2 * key_size / total).unsqueeze(-1)
    g_error2.addcmul_(parts.error2, g_ratio)
    g_error.addcmul_(saved.error, g_ratio * -ratio.unsqueeze(-1))
    # error2 = (W1^T error) * silu'(W2 k)
    g_pulled = g_error2 * parts.slope
    g_bend = _curve_(g_error2.mul_(saved.pulled), saved.pre[:, :size]).add_(g2.products)
    g_error.baddbmm_(g_pulled, step.w1.mT)
    g_w1 = g1.weight.baddbmm_(saved.error.mT, g_pulled)
    # error = M(k) - M(v); W1's products for the keys serve the recurrence too
    g_out = torch.cat([g_error + g1.products, -g_error], 1)
    g_w1.baddbmm_(g_out.mT, saved.hidden)
    g_hidden = torch.bmm(g_out, step.w1)
    g_hidden[:, :size].add_(g_h)
    g_pre = g_hidden.mul_(_slope(saved.pre, saved.hidden))
    g_pre[:, :size].add_(g_bend)
    g_w2 = g2.weight.baddbmm_(g_pre.mT, rows)
    g_rows = torch.bmm(g_pre, step.w2)
    g_rows[:, :size].add_(g_k).add_(g_error)
    g_rows[:, size:].sub_(g_error)

    def shared(g: Tensor | None) -> Tensor | None:
        return None if g is None else g.unflatten(0, (n, groups)).sum(0)

    g_rows = shared(g_rows)
    g_mu = None if step.mu is None else shared(reach * parts.rate)
    tables = [None if a is None else shared(a.add_(b)) for a, b in ((g1.decay, g2.decay), (g1.mixed, g2.mixed), (g1.momentum, g2.momentum))]
    return (
        g_w2, g_w1, g2.velocity, g1.velocity, g_rows[:, :size], g_rows[:, size:], g_q, shared(g_eta), g_mu, *tables
    )  # fmt: skip
