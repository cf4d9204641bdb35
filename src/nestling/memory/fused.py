"""One chunk of the default rule on MLP memories, differentiated by hand.

`rule.advance` is the definition of what happens here for: MLP memories with residual, objective "l2", self-generated
targets, DGD, step "joint", exact meta-gradients, a chunk that begins at its start. A test ties the two in float64,
values and gradients. By hand, the backward pass keeps less and writes fewer temporaries: most of its time on a CPU.

Memories are one batch [N, ...], N = n * G: n stacked memories of the G = B * H heads; the last G are read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.memory.architectures import Architecture, LinearMemory, MLPMemory
from nestling.memory.fused_linear import flat, linear_advance
from nestling.memory.rule import Anchor, Context, FastWeights, UpdateRule, advance, joint_step
from nestling.ops import compiled
from nestling.ops import triton as kernels
from nestling.ops.chunk import Chunk, Decays, chunk_backward, chunk_forward, differentiate, dot, unrounded
from nestling.ops.compiled import step as compiled_step


def is_fused(architecture: Architecture, rule: UpdateRule) -> bool:
    """Whether `fused_advance` stands for `rule.advance` with these settings."""
    mlp = isinstance(architecture, MLPMemory) and architecture.residual
    return (mlp or isinstance(architecture, LinearMemory)) and rule == UpdateRule()


def fused_advance(
    architecture: Architecture,
    rule: UpdateRule,
    fast: FastWeights,
    context: Context,
    *,
    queries: Tensor | None,
    after: bool,
    anchor: Anchor,
) -> tuple[FastWeights, Tensor | None, None]:
    """`rule.advance` for a chunk from its start (`fresh`), without a report."""
    if isinstance(architecture, LinearMemory):
        return linear_advance(architecture, rule, fast, context, queries=queries, after=after, anchor=anchor)
    lead, no = fast.now[0].shape[:3], (None, None)
    (w2, w1), (s2, s1), (anchor2, anchor1) = fast.now, fast.velocity or no, anchor or no
    step = MLPStep(
        w2=flat(w2, 3), w1=flat(w1, 3), s2=flat(s2, 3), s1=flat(s1, 3), keys=flat(context.keys, 2),
        values=flat(context.values, 2), queries=flat(queries, 2), eta=flat(context.rate, 2),
        mu=flat(context.momentum, 2), decay=flat(context.decays.decay, 2), mixed=flat(context.decays.mixed, 2),
        momentum=flat(context.decays.momentum, 2), anchor2=flat(anchor2, 3), anchor1=flat(anchor1, 3),
    )  # fmt: skip

    step = MLPStep(*(None if t is None else t.contiguous() for t in step))
    if kernels.is_available(*step, sides=tuple(step.w2.shape[1:]), tokens=step.keys.shape[1]):
        from nestling.memory.fused_kernels import mlp_step, mlp_whole_step  # triton is imported where it is used

        w2, w1, s2, s1, reads = (mlp_whole_step if kernels.is_whole() else mlp_step)(step, after)
    else:
        w2, w1, s2, s1, reads = _Step.apply(after, *step)
    now = w2.view(*lead, *w2.shape[1:]), w1.view(*lead, *w1.shape[1:])
    velocity = (s2.view_as(now[0]), s1.view_as(now[1])) if fast.velocity else ()
    return FastWeights(fast.start, now, velocity), None if reads is None else reads.view_as(queries), None


class MLPStep(NamedTuple):
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
    anchor2: Tensor | None  # what W2 and W1 decay towards
    anchor1: Tensor | None


def by_rule(step: MLPStep, after: bool) -> tuple[Tensor | None, ...]:
    """The same by `rule.advance`, for second derivatives: w2, w1, s2, s1 and the reads."""
    groups = step.keys.shape[0]

    def stacked(*weights: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(w.unflatten(0, (-1, 1, groups)) for w in weights if w is not None)

    def heads(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.unsqueeze(0)

    weights, hidden = stacked(step.w2, step.w1), step.w2.shape[1]
    tokens = Context(
        keys=heads(step.keys), values=heads(step.values), rate=heads(step.eta), decay=None, momentum=heads(step.mu),
        decays=Decays(heads(step.decay), heads(step.mixed), heads(step.momentum)),
    )  # fmt: skip
    inner = step.keys.shape[-1]
    new, reads, _ = advance(
        MLPMemory(inner, inner, hidden), UpdateRule(), FastWeights(weights, weights, stacked(step.s2, step.s1)), tokens,
        fresh=True, queries=heads(step.queries), after=after, anchor=stacked(step.anchor2, step.anchor1),
    )  # fmt: skip
    return *(flat(w, 3) for w in (*new.now, *(new.velocity or (None, None)))), flat(reads, 2)


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, after, *args):
        step = MLPStep(*args)
        ctx.after, ctx.compiled = after, compiled.is_available(*step)
        outputs, saved = (compiled_step.forward if ctx.compiled else _forward)(step, after)
        ctx.save_for_backward(*step, *saved)
        return outputs

    @staticmethod
    @unrounded
    def backward(ctx, *grads):
        tensors = ctx.saved_tensors  # once: recomputation allows one unpacking
        args, saved = tensors[: len(MLPStep._fields)], tensors[len(MLPStep._fields) :]
        if torch.is_grad_enabled():  # a second derivative is wanted
            return None, *differentiate(
                lambda *a: by_rule(MLPStep(*a), ctx.after), args, grads, ctx.needs_input_grad[1:]
            )
        if ctx.compiled:
            kept = compiled_step.CompiledSaved(*saved)
            return None, *compiled_step.backward(MLPStep(*args), ctx.after, kept, *grads)
        return None, *_backward(MLPStep(*args), ctx.after, Saved(*saved), *grads)


class Saved(NamedTuple):
    pre: Tensor  # W2 k, [N, C, h]
    hidden: Tensor  # silu(W2 [k; v]), [N, 2C, h]
    slope: Tensor  # silu' there
    error: Tensor  # M(k) - M(v), [N, C, p]
    pulled: Tensor  # W1^T error, [N, C, h]
    error2: Tensor  # the error at the first layer, pulled * slope
    out: Tensor  # W1 hidden for the keys, [N, C, p]
    sizes: Tensor  # |h|^2, |k|^2, |error|^2 + eps, |error2|^2, and the step e: [5, N, C]
    writes2: Tensor  # u of the first layer
    writes1: Tensor
    d2: Tensor
    d1: Tensor
    read: Tensor | None  # the first layer's read of q, [G, C, h]


def _silu(pre: Tensor) -> tuple[Tensor, Tensor]:
    """silu and its slope."""
    s = torch.sigmoid(pre)
    out = pre * s
    return out, torch.addcmul(s, s, pre - out)


def _bent_(grad: Tensor, pre: Tensor, out: Tensor) -> Tensor:
    """grad * silu''(pre), in place; out = silu(pre)."""
    s = torch.sigmoid(pre)
    bend = torch.sub(pre, out, alpha=2).add_(2).mul_(s.addcmul_(s, s, value=-1))
    return grad.mul_(bend)


def _square(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1).square_()


def _shape(step: MLPStep) -> tuple[int, int, int]:
    """Memories in the stack n, heads G, tokens C."""
    return step.w2.shape[0] // step.keys.shape[0], step.keys.shape[0], step.keys.shape[1]


def _tables(step: MLPStep) -> dict[str, Tensor | None]:
    """The decay tables of a `Chunk`, the same for every memory of a head."""
    n, tables = _shape(step)[0], Decays(step.decay, step.mixed, step.momentum)
    return {name: None if t is None else t.repeat(n, 1, 1) for name, t in tables._asdict().items()}


def _shrink(step: MLPStep) -> Tensor | float:
    return 1.0 if step.mu is None else (1 - step.mu).repeat(_shape(step)[0], 1)


def _chunks(step: MLPStep, rows: Tensor, saved: Saved, read: Tensor | None) -> tuple[Chunk, Chunk]:
    """The delta rule of either layer; `read` are the second layer's queries."""
    size, rate, tables = step.keys.shape[1], saved.sizes[4], _tables(step)
    first = Chunk(
        weight=step.w2, velocity=step.s2, products=saved.pre, keys=rows[:, :size], writes=saved.writes2, erase=rate,
        queries=step.queries, anchor=step.anchor2, **tables,
    )  # fmt: skip
    second = Chunk(
        weight=step.w1, velocity=step.s1, products=saved.out, keys=saved.hidden[:, :size], writes=saved.writes1,
        erase=rate, queries=read, anchor=step.anchor1, **tables,
    )  # fmt: skip
    return first, second


def _forward(step: MLPStep, after: bool):
    n, _, size = _shape(step)
    rows = torch.cat([step.keys, step.values], 1).repeat(n, 1, 1)
    pre = torch.bmm(rows, step.w2.mT)
    hidden, slope = _silu(pre)
    out = torch.bmm(hidden, step.w1.mT)
    error = (rows[:, :size] - rows[:, size:]).add_(out[:, :size]).sub_(out[:, size:])  # M(k) - M(v)
    pulled = torch.bmm(error, step.w1)
    error2 = pulled * slope[:, :size]
    h_size, key_size, size2 = _square(hidden[:, :size]), _square(step.keys).repeat(n, 1), _square(error2)
    rate, total = joint_step(step.eta.repeat(n, 1), [key_size, h_size], [size2, _square(error)])
    scale = (-rate * _shrink(step)).unsqueeze(-1)
    saved = Saved(
        pre=pre[:, :size], hidden=hidden, slope=slope, error=error, pulled=pulled, error2=error2, out=out[:, :size],
        sizes=torch.stack([h_size, key_size, total, size2, rate]), writes2=error2 * scale, writes1=error * scale,
        d2=None, d1=None, read=None,
    )  # fmt: skip
    first, second = _chunks(step, rows, saved, None)
    w2, s2, read, d2 = chunk_forward(first, after)
    if read is not None:
        second = second._replace(queries=F.silu(read))
    w1, s1, y, d1 = chunk_forward(second, after)
    return (w2, w1, s2, s1, None if y is None else y.add_(step.queries)), saved._replace(d2=d2, d1=d1, read=read)


def _backward(step: MLPStep, after: bool, saved: Saved, g_w2, g_w1, g_s2, g_s1, g_y) -> MLPStep:
    """Gradients of every field of the step, from those of weights, velocities and reads."""
    n, groups, size = _shape(step)
    rows = torch.cat([step.keys, step.values], 1).repeat(n, 1, 1)
    read, read_slope = (None, None) if saved.read is None else _silu(saved.read)
    first, second = _chunks(step, rows, saved, read)

    # the recurrences, second layer first: its read is the last thing computed
    g1 = chunk_backward(second, after, saved.d1, g_w1, g_s1, g_y)
    g_read = None if read is None or g_y is None else g1.queries.mul_(read_slope)
    g2 = chunk_backward(first, after, saved.d2, g_w2, g_s2, g_read)
    g_h, g_k = g1.keys, g2.keys

    # writes u = -e (1 - mu) error, erase e
    h_size, key_size, total, size2, rate = saved.sizes
    eta, shrink = step.eta.repeat(n, 1), _shrink(step)
    reach = dot(g1.writes, saved.error).add_(dot(g2.writes, saved.error2))
    g_rate = g1.erase.add_(g2.erase) - reach * shrink
    scale = (-rate * shrink).unsqueeze(-1)
    # e = eta / (1 + eta kappa), kappa = |h|^2 + |k|^2 (1 + |error2|^2 / |error|^2)
    ratio = size2 / total
    g_kappa = -2 * rate.square() * g_rate
    g_eta = g_rate / (1 + eta * (h_size + key_size * (1 + ratio))).square()
    g_ratio = g_kappa * key_size / total
    h, keys = saved.hidden[:, :size], rows[:, :size]
    g_h.addcmul_(h, g_kappa.unsqueeze(-1))
    g_k.addcmul_(keys, (g_kappa * (1 + ratio)).unsqueeze(-1))
    g_error = g1.writes.mul_(scale).addcmul_(saved.error, (-g_ratio * ratio).unsqueeze(-1))
    g_error2 = g2.writes.mul_(scale).addcmul_(saved.error2, g_ratio.unsqueeze(-1))
    # error2 = (W1^T error) * silu'(W2 k)
    g_pulled = g_error2 * saved.slope[:, :size]
    g_pre_keys = _bent_(g_error2.mul_(saved.pulled), saved.pre, h).add_(g2.products)
    g_error.baddbmm_(g_pulled, step.w1.mT)
    g_w1 = g1.weight.baddbmm_(saved.error.mT, g_pulled)
    # error = M(k) - M(v); W1's products for the keys serve the recurrence too
    g_out = torch.cat([g_error + g1.products, -g_error], 1)
    g_w1.baddbmm_(g_out.mT, saved.hidden)
    g_pre = torch.bmm(g_out, step.w1)
    g_pre[:, :size].add_(g_h)
    g_pre.mul_(saved.slope)
    g_pre[:, :size].add_(g_pre_keys)
    g_w2 = g2.weight.baddbmm_(g_pre.mT, rows)
    g_rows = torch.bmm(g_pre, step.w2)
    g_rows[:, :size].add_(g_k).add_(g_error)
    g_rows[:, size:].sub_(g_error)

    def shared(g: Tensor) -> Tensor:
        """What all memories of a head were given is given once."""
        return g.unflatten(0, (n, groups)).sum(0)

    g_rows = shared(g_rows)
    pairs = {name: (getattr(g1, name), getattr(g2, name)) for name in Decays._fields}
    tables = {name: None if a is None else shared(a.add_(b)) for name, (a, b) in pairs.items()}
    g_mu = None if step.mu is None else shared(reach * rate)
    g_q = None if g_y is None or read is None else g2.queries.add_(g_y)
    return MLPStep(
        w2=g_w2, w1=g_w1, s2=g2.velocity, s1=g1.velocity, keys=g_rows[:, :size], values=g_rows[:, size:], queries=g_q,
        eta=shared(g_eta), mu=g_mu, anchor2=g2.anchor, anchor1=g1.anchor, **tables,
    )  # fmt: skip
