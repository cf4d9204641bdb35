"""The delta rule over one chunk and its decay tables as operators of torch, which torch.compile leaves whole."""

from __future__ import annotations

import torch
from torch import Tensor

from nestling.ops.chunk import Chunk, _decay_table, chunk_reference, differentiate
from nestling.ops.triton.launch import backward_rule, backward_table, forward_rule, forward_table

_ALWAYS = ("weight", "keys", "writes", "decay")
FIELDS = ", ".join(f"Tensor{'' if name in _ALWAYS else '?'} {name}" for name in Chunk._fields)


def delta_chunk(c: Chunk, after: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`ops.chunk.delta_chunk` by the kernels; `c` is contiguous."""
    weight, velocity, reads, *_ = _forward(*c, after)
    return weight, None if c.velocity is None else velocity, None if c.queries is None else reads


def _outputs(c: Chunk) -> tuple[Tensor, ...]:
    """Weight, velocity, reads, d and the system's inverse; empty where there is none."""
    total, tokens, outs = c.writes.shape
    new = c.weight.new_empty
    solved = (total, tokens) if c.erase is not None else (0, 0)
    return (
        torch.empty_like(c.weight),
        new(0) if c.velocity is None else torch.empty_like(c.velocity),
        new(0) if c.queries is None else new(c.queries.shape[0], tokens, outs),
        new(*solved, outs),
        new(*solved, tokens),
    )


@torch.library.custom_op(
    "nestling::delta_chunk",
    mutates_args=(),
    schema=f"({FIELDS}, bool after) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(*args):
    c, after = Chunk(*args[:-1]), args[-1]
    outputs = _outputs(c)
    forward_rule(c, outputs, after, c.decay.shape[0])
    return outputs


@_forward.register_fake
def _(*args):
    return _outputs(Chunk(*args[:-1]))


def _gradients(c: Chunk) -> tuple[Tensor, ...]:
    """Places for the gradient of every field, empty where there is none."""
    return tuple(c.weight.new_empty(0) if t is None else torch.empty_like(t) for t in c)


@torch.library.custom_op(
    "nestling::delta_chunk_backward",
    mutates_args=(),
    schema=f"({FIELDS}, bool after, Tensor d, Tensor inverse, Tensor? g_weight, Tensor? g_velocity, Tensor? g_reads)"
    f" -> ({', '.join(['Tensor'] * len(Chunk._fields))})",
)
def _backward(*args):
    count = len(Chunk._fields)
    c, after, saved, grads = Chunk(*args[:count]), args[count], args[count + 1 : count + 3], list(args[count + 3 :])
    for i, state in enumerate((c.weight, c.velocity)):
        grads[i] = None if state is None else torch.zeros_like(state) if grads[i] is None else grads[i].contiguous()
    if grads[2] is not None:
        grads[2] = grads[2].contiguous()
    found = _gradients(c)
    if c.queries is not None and grads[2] is None:
        found[Chunk._fields.index("queries")].zero_()
    backward_rule(c, saved, grads, found, after, c.decay.shape[0], table_stride=c.decay[0].numel())
    return found


@_backward.register_fake
def _(*args):
    return _gradients(Chunk(*args[: len(Chunk._fields)]))


def _setup(ctx, inputs, output):
    ctx.after = inputs[-1]
    ctx.save_for_backward(*inputs[:-1], *output[3:])
    ctx.set_materialize_grads(False)


def _autograd(ctx, g_weight, g_velocity, g_reads, *_):
    count = len(Chunk._fields)
    args, saved = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
    c, grads = Chunk(*args), [g_weight, g_velocity, g_reads]
    for i, field in ((1, c.velocity), (2, c.queries)):
        if field is None:
            grads[i] = None
    if torch.is_grad_enabled():  # a second derivative is wanted
        reference = lambda *a: chunk_reference(Chunk(*a), ctx.after)  # noqa: E731
        return *differentiate(reference, args, grads, ctx.needs_input_grad[:count]), None
    found = _backward(*args, ctx.after, *saved, *grads)
    return *(None if a is None else g for a, g in zip(args, found, strict=True)), None


_forward.register_autograd(_autograd, setup_context=_setup)


def decay_table(decay: Tensor, momentum: Tensor | None) -> tuple[Tensor | None, ...]:
    """`ops.chunk.decay_table` by the kernels: A, K, M of contiguous [..., C]."""
    lead, tokens = decay.shape[:-1], decay.shape[-1]
    tables = _table_forward(decay.flatten(0, -2), None if momentum is None else momentum.flatten(0, -2))
    shape = *lead, tokens + 1, tokens + 1
    return tuple(None if momentum is None and i else t.view(shape) for i, t in enumerate(tables))


def _tables(decay: Tensor, momentum: Tensor | None) -> tuple[Tensor, ...]:
    groups, side = decay.shape[0], decay.shape[1] + 1
    return tuple(decay.new_empty((groups, side, side) if there else 0) for there in (True, *[momentum is not None] * 2))


@torch.library.custom_op(
    "nestling::decay_table", mutates_args=(), schema="(Tensor decay, Tensor? momentum) -> (Tensor, Tensor, Tensor)"
)
def _table_forward(decay, momentum):
    tables = _tables(decay, momentum)
    forward_table(decay, momentum, tables)
    return tables


_table_forward.register_fake(_tables)


@torch.library.custom_op(
    "nestling::decay_table_backward",
    mutates_args=(),
    schema="(Tensor A, Tensor? M, Tensor? g_A, Tensor? g_K, Tensor? g_M) -> (Tensor, Tensor)",
)
def _table_backward(A, M, g_A, g_K, g_M):
    grads = [torch.zeros_like(A) if g is None else g.contiguous() for g in (g_A, g_K, g_M)]
    found = _table_places(A, M)
    backward_table((A, M), grads, found)
    return found


def _table_places(A, M, *_):
    places = A.new_empty(A.shape[0], A.shape[1] - 1)
    return places, A.new_empty(0) if M is None else torch.empty_like(places)


_table_backward.register_fake(_table_places)


def _table_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[0], None if inputs[1] is None else output[2])
    ctx.set_materialize_grads(False)


def _table_autograd(ctx, *grads):
    decay, momentum, A, M = ctx.saved_tensors
    grads = [g if i == 0 or momentum is not None else None for i, g in enumerate(grads)]
    if torch.is_grad_enabled():  # a second derivative is wanted
        return tuple(differentiate(_decay_table, (decay, momentum), grads, ctx.needs_input_grad))
    g_decay, g_momentum = _table_backward(A, M, *grads)
    return g_decay, None if momentum is None else g_momentum


_table_forward.register_autograd(_table_autograd, setup_context=_table_setup)
