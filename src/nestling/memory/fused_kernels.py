"""The chunk steps by GPU kernels as operators: `nestling::mlp_step`, `mlp_whole_step` and `linear_step`.

torch.compile leaves an operator whole; its second derivative is the rule's.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nestling.memory.fused import MLPStep, by_rule
from nestling.memory.fused_linear import linear_by_rule
from nestling.ops.chunk import differentiate
from nestling.ops.compiled.linear import LinearStep
from nestling.ops.triton import linear, shares, step, whole_step

_ALWAYS = ("w2", "w1", "weight", "keys", "values", "eta", "decay")


def _operator(name: str, kind: Any, form: ModuleType, definition: Callable) -> Callable:
    """Register forward and backward of a chunk step; `form` says what its results, saved and own gradients are."""
    count, results, kept = len(kind._fields), len(form.RESULTS), len(form.Saved._fields)
    given = ", ".join(f"Tensor{'' if field in _ALWAYS else '?'} {field}" for field in kind._fields)
    saved_names = ", ".join(f"Tensor saved_{field}" for field in form.Saved._fields)
    grad_names = ", ".join(f"Tensor? g_{field}" for field in form.RESULTS)

    def tensors(number: int) -> str:
        return f"({', '.join(['Tensor'] * number)})"

    @torch.library.custom_op(
        f"nestling::{name}", mutates_args=(), schema=f"({given}, bool after) -> {tensors(results + kept)}"
    )
    def forward(*args):
        outputs, saved = form.forward(kind(*args[:-1]), args[-1])
        return *outputs, *saved

    @forward.register_fake
    def _(*args):
        outputs, saved = form.outputs(kind(*args[:-1]))
        return *outputs, *saved

    @torch.library.custom_op(
        f"nestling::{name}_backward",
        mutates_args=(),
        schema=f"({given}, bool after, {saved_names}, {grad_names}) -> {tensors(len(form.OWN) + 1)}",
    )
    def backward(*args):
        arguments, saved = kind(*args[:count]), form.Saved(*args[count + 1 : count + 1 + kept])
        *own, shared = form.backward(arguments, args[count], saved, *args[count + 1 + kept :])
        return *(p.zero_() if g is None else g for g, p in zip(own, places(arguments), strict=True)), shared

    def places(arguments) -> list[Tensor]:
        fields = (getattr(arguments, field) for field in form.OWN)
        return [arguments.keys.new_empty(0) if t is None else torch.empty_like(t) for t in fields]

    @backward.register_fake
    def _(*args):
        arguments = kind(*args[:count])
        return *places(arguments), args[0].new_empty(arguments.keys.shape[0], shares.width(arguments))

    def setup(ctx, inputs, output):
        ctx.after = inputs[-1]
        ctx.save_for_backward(*inputs[:-1], *output[results:])
        ctx.set_materialize_grads(False)

    def autograd(ctx, *grads):
        tensors = ctx.saved_tensors  # once: recomputation allows one unpacking
        arguments, saved = kind(*tensors[:count]), tensors[count:]
        grads = [g if getattr(arguments, f) is not None else None for f, g in zip(form.RESULTS, grads, strict=False)]
        if torch.is_grad_enabled():  # a second derivative is wanted
            needed = ctx.needs_input_grad[:count]
            return *differentiate(lambda *a: definition(kind(*a), ctx.after), arguments, grads, needed), None
        *own, shared = backward(*arguments, ctx.after, *saved, *grads)
        found = dict(zip(form.OWN, own, strict=True)) | shares.unpack(shared, arguments)
        named = arguments._asdict().items()
        return *(None if t is None else found[field].view_as(t).to(t.dtype) for field, t in named), None

    forward.register_autograd(autograd, setup_context=setup)

    def run(arguments, after: bool) -> tuple[Tensor | None, ...]:
        outputs = forward(*arguments, after)[:results]
        return tuple(
            o if getattr(arguments, f) is not None else None for f, o in zip(form.RESULTS, outputs, strict=True)
        )

    run.__doc__ = f"`nestling::{name}` of a contiguous `{kind.__name__}`: new weights, new velocities, reads."
    return run


mlp_step = _operator("mlp_step", MLPStep, step, by_rule)
mlp_whole_step = _operator("mlp_whole_step", MLPStep, whole_step, by_rule)
linear_step = _operator("linear_step", LinearStep, linear, linear_by_rule)
