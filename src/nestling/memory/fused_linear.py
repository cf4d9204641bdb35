"""One chunk of the default rule on linear memories as one call of the C++ library; `rule.advance` is the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from nestling.memory.architectures import LinearMemory
from nestling.memory.rule import Anchor, Context, FastWeights, TokenFigures, UpdateRule, advance
from nestling.ops import compiled
from nestling.ops.chunk import Decays, differentiate
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
    lead = weight.shape[:3]
    step = compiled_linear.LinearStep(
        weight=flat(weight, 3), velocity=flat(velocity, 3), keys=flat(context.keys, 2), values=flat(context.values, 2),
        queries=flat(queries, 2), eta=flat(context.rate, 2), mu=flat(context.momentum, 2),
        decay=flat(context.decays.decay, 2), mixed=flat(context.decays.mixed, 2),
        momentum=flat(context.decays.momentum, 2), anchor=flat(toward, 3),
    )  # fmt: skip
    if not compiled.is_available(*step):
        return advance(
            architecture, rule, fast, context, fresh=True, queries=queries, after=after, anchor=anchor
        )  # fmt: skip

    def definition(*args):
        """The same by `rule.advance`, for second derivatives."""
        s = compiled_linear.LinearStep(*args)

        def stacked(w: Tensor | None) -> tuple[Tensor, ...]:
            return () if w is None else (w.view(*lead, *w.shape[1:]),)

        def heads(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.view(*lead[1:], *t.shape[1:])

        tokens = Context(
            keys=heads(s.keys), values=heads(s.values), rate=heads(s.eta), decay=None, momentum=heads(s.mu),
            decays=Decays(heads(s.decay), heads(s.mixed), heads(s.momentum)),
        )  # fmt: skip
        weights = stacked(s.weight)
        new, reads, _ = advance(
            architecture, rule, FastWeights(weights, weights, stacked(s.velocity)), tokens, fresh=True,
            queries=heads(s.queries), after=after, anchor=stacked(s.anchor),
        )  # fmt: skip
        (moved,) = new.velocity or no
        return flat(new.now[0], 3), flat(moved, 3), flat(reads, 2)

    weight, velocity, reads = _Linear.apply(definition, after, *(None if t is None else t.contiguous() for t in step))
    now = (weight.view_as(fast.now[0]),)
    moved = () if velocity is None else (velocity.view_as(now[0]),)
    return FastWeights(fast.start, now, moved), None if reads is None else reads.view(*queries.shape[:3], -1), None


def flat(t: Tensor | None, count: int) -> Tensor | None:
    """The first `count` dimensions as one."""
    return None if t is None else t.flatten(0, count - 1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, definition, after, *args):
        ctx.definition, ctx.after = definition, after
        outputs, saved = compiled_linear.forward(compiled_linear.LinearStep(*args), after)
        ctx.save_for_backward(*args, *saved)
        return outputs

    @staticmethod
    def backward(ctx, *grads):
        tensors, count = ctx.saved_tensors, len(compiled_linear.LinearStep._fields)
        args, saved = tensors[:count], tensors[count:]
        if torch.is_grad_enabled():  # a second derivative is wanted
            return None, None, *differentiate(ctx.definition, args, grads, ctx.needs_input_grad[2:])
        return None, None, *compiled_linear.backward(compiled_linear.LinearStep(*args), ctx.after, saved, *grads)
