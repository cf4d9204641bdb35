"""The chunk step of MLP memories as an operator of torch, `nestling::mlp_step`, which torch.compile leaves whole."""

from __future__ import annotations

import torch
from torch import Tensor

from nestling.memory.fused import MLPStep, by_rule
from nestling.ops.chunk import differentiate
from nestling.ops.triton import step as kernels

COUNT = len(MLPStep._fields)
_ALWAYS = ("w2", "w1", "keys", "values", "eta", "decay")
FIELDS = ", ".join(f"Tensor{'' if name in _ALWAYS else '?'} {name}" for name in MLPStep._fields)
SAVED = len(kernels.KernelSaved._fields)


def mlp_step(step: MLPStep, after: bool) -> tuple[Tensor | None, ...]:
    """w2, w1, s2, s1 after the chunk and the reads; `step` is contiguous."""
    outputs = _forward(*step, after)[:5]
    present = True, True, step.s2 is not None, step.s1 is not None, step.queries is not None
    return tuple(t if there else None for t, there in zip(outputs, present, strict=True))


def _schema(names: str, count: int) -> str:
    return f"({names}) -> ({', '.join(['Tensor'] * count)})"


@torch.library.custom_op(
    "nestling::mlp_step", mutates_args=(), schema=_schema(f"{FIELDS}, bool after", 5 + SAVED)
)  # fmt: skip
def _forward(*args):
    outputs, saved = kernels.forward(MLPStep(*args[:-1]), args[-1])
    return *outputs, *saved


@_forward.register_fake
def _(*args):
    outputs, saved = kernels.outputs(MLPStep(*args[:-1]))
    return *outputs, *saved


_BACKWARD = ", ".join(
    [FIELDS, "bool after", *(f"Tensor {name}" for name in kernels.KernelSaved._fields)]
    + [f"Tensor? g_{name}" for name in ("w2", "w1", "s2", "s1", "reads")]
)


@torch.library.custom_op(
    "nestling::mlp_step_backward", mutates_args=(), schema=_schema(_BACKWARD, len(kernels.OWN) + 1)
)
def _backward(*args):
    step, after, saved = MLPStep(*args[:COUNT]), args[COUNT], kernels.KernelSaved(*args[COUNT + 1 : COUNT + 1 + SAVED])
    *own, shared = kernels.backward(step, after, saved, *args[COUNT + 1 + SAVED :])
    places = zip(own, _places(step), strict=True)
    return *(place.zero_() if g is None else g for g, place in places), shared


def _places(step: MLPStep) -> list[Tensor]:
    fields = (getattr(step, name) for name in kernels.OWN)
    return [step.w2.new_empty(0) if t is None else torch.empty_like(t) for t in fields]


@_backward.register_fake
def _(*args):
    step = MLPStep(*args[:COUNT])
    return *_places(step), step.w2.new_empty(step.keys.shape[0], kernels.shared_size(step))


def _setup(ctx, inputs, output):
    ctx.after = inputs[-1]
    ctx.save_for_backward(*inputs[:-1], *output[5:])
    ctx.set_materialize_grads(False)


def _autograd(ctx, *grads):
    args, saved = ctx.saved_tensors[:COUNT], ctx.saved_tensors[COUNT:]
    step = MLPStep(*args)
    given = step.w2, step.w1, step.s2, step.s1, step.queries
    grads = [None if t is None else g for t, g in zip(given, grads[:5], strict=True)]
    if torch.is_grad_enabled():  # a second derivative is wanted
        return *differentiate(
            lambda *a: by_rule(MLPStep(*a), ctx.after), args, grads, ctx.needs_input_grad[:COUNT]
        ), None
    *own, shared = _backward(*args, ctx.after, *saved, *grads)
    found = dict(zip(kernels.OWN, own, strict=True)) | kernels.unpack(shared, step)
    return *(None if t is None else found[name].view_as(t).to(t.dtype) for name, t in step._asdict().items()), None


_forward.register_autograd(_autograd, setup_context=_setup)
