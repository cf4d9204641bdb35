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
    (weight,), (velocity,), (rest,) = fast.now, fast.velocity or (None,), anchor or (None,)
    lead = weight.shape[:3]
    heads = (context.keys, context.values, queries, context.rate, context.momentum, *context.decays)
    step = compiled_linear.LinearStep(
        _flat(weight, 3), _flat(velocity, 3), *(_flat(t, 2) for t in heads), _flat(rest, 3)
    )  # fmt: skip
    if not compiled.is_available(*step):
        return advance(
            architecture, rule, fast, context, fresh=True, queries=queries, after=after, anchor=anchor
        )  # fmt: skip

    def definition(*args):
        """The same by `rule.advance`, for second derivatives."""
        s = compiled_linear.LinearStep(*args)
        w, v, a = (None if t is None else t.view(*lead, *t.shape[1:]) for t in (s.weight, s.velocity, s.anchor))
        k, values, q, eta, mu, *tables = (None if t is None else t.view(*lead[1:], *t.shape[1:]) for t in s[2:-1])
        weights = FastWeights((w,), (w,), () if v is None else (v,))
        tokens = Context(k, values, eta, None, mu, Decays(*tables))
        new, reads, _ = advance(
            architecture, rule, weights, tokens, fresh=True, queries=q, after=after, anchor=() if a is None else (a,)
        )  # fmt: skip
        return _flat(new.now[0], 3), None if v is None else _flat(new.velocity[0], 3), _flat(reads, 2)

    weight, velocity, reads = _Linear.apply(definition, after, *(None if t is None else t.contiguous() for t in step))
    now = (weight.view_as(fast.now[0]),)
    moved = () if velocity is None else (velocity.view_as(now[0]),)
    return FastWeights(fast.start, now, moved), None if reads is None else reads.view(*queries.shape[:3], -1), None


def _flat(t: Tensor | None, count: int) -> Tensor | None:
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
