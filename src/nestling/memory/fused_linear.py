"""One chunk of the default rule on linear memories as one call of the C++ library; `rule.advance` is the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from nestling.memory.architectures import LinearMemory
from nestling.memory.rule import Anchor, Context, FastWeights, TokenFigures, UpdateRule, advance
from nestling.ops import compiled
from nestling.ops import triton as kernels
from nestling.ops.chunk import Decays, differentiate, unrounded
from nestling.ops.compiled import linear as compiled_linear


def linear_advance(
    architecture: LinearMemory,
    rule: UpdateRule,
    fast: FastWeights,
    context: Context,
    *,
    queries: Tensor | None,
    after: bool,
    anchor: Anchor,
) -> tuple[FastWeights, Tensor | None, TokenFigures | None]:
    """`rule.advance` for a chunk from its start (`fresh`)."""
    no = (None,)
    (weight,), (velocity,), (toward,) = fast.now, fast.velocity or no, anchor or no
    step = compiled_linear.LinearStep(
        weight=flat(weight, 3), velocity=flat(velocity, 3), keys=flat(context.keys, 2), values=flat(context.values, 2),
        queries=flat(queries, 2), eta=flat(context.rate, 2), mu=flat(context.momentum, 2),
        decay=flat(context.decays.decay, 2), mixed=flat(context.decays.mixed, 2),
        momentum=flat(context.decays.momentum, 2), anchor=flat(toward, 3),
    )  # fmt: skip
    by_kernels = kernels.is_available(*step, sides=tuple(weight.shape[-2:]), tokens=step.keys.shape[1])
    if not by_kernels and not compiled.is_available(*step):
        return advance(
            architecture, rule, fast, context, fresh=True, queries=queries, after=after, anchor=anchor
        )  # fmt: skip
    step = compiled_linear.LinearStep(*(None if t is None else t.contiguous() for t in step))
    if by_kernels:
        from nestling.memory.fused_kernels import linear_step  # triton itself is imported where it is used

        weight, velocity, reads = linear_step(step, after)
    else:
        weight, velocity, reads = _Linear.apply(after, *step)
    now = (weight.view_as(fast.now[0]),)
    moved = () if velocity is None else (velocity.view_as(now[0]),)
    return FastWeights(fast.start, now, moved), None if reads is None else reads.view(*queries.shape[:3], -1), None


def linear_by_rule(step: compiled_linear.LinearStep, after: bool) -> tuple[Tensor | None, ...]:
    """The same by `rule.advance`, for second derivatives: weight, velocity and the reads."""
    groups, (outs, ins) = step.keys.shape[0], step.weight.shape[1:]

    def stacked(w: Tensor | None) -> tuple[Tensor, ...]:
        return () if w is None else (w.unflatten(0, (-1, 1, groups)),)

    def heads(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.unsqueeze(0)

    tokens = Context(
        keys=heads(step.keys), values=heads(step.values), rate=heads(step.eta), decay=None, momentum=heads(step.mu),
        decays=Decays(heads(step.decay), heads(step.mixed), heads(step.momentum)),
    )  # fmt: skip
    weights = stacked(step.weight)
    new, reads, _ = advance(
        LinearMemory(ins, outs), UpdateRule(), FastWeights(weights, weights, stacked(step.velocity)), tokens,
        fresh=True, queries=heads(step.queries), after=after, anchor=stacked(step.anchor),
    )  # fmt: skip
    (moved,) = new.velocity or (None,)
    return flat(new.now[0], 3), flat(moved, 3), flat(reads, 2)


def flat(t: Tensor | None, count: int) -> Tensor | None:
    """The first `count` dimensions as one."""
    return None if t is None else t.flatten(0, count - 1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, after, *args):
        ctx.after = after
        outputs, saved = compiled_linear.forward(compiled_linear.LinearStep(*args), after)
        ctx.save_for_backward(*args, *saved)
        return outputs

    @staticmethod
    @unrounded
    def backward(ctx, *grads):
        tensors, count = ctx.saved_tensors, len(compiled_linear.LinearStep._fields)
        args, saved = tensors[:count], tensors[count:]
        if torch.is_grad_enabled():  # a second derivative is wanted
            definition = lambda *a: linear_by_rule(compiled_linear.LinearStep(*a), ctx.after)  # noqa: E731
            return None, *differentiate(definition, args, grads, ctx.needs_input_grad[1:])
        return None, *compiled_linear.backward(compiled_linear.LinearStep(*args), ctx.after, saved, *grads)
