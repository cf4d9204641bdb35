"""A bound on the Frobenius norm of every matrix of a batch, `nestling::bounded`: one launch each way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nestling.ops.chunk import differentiate
from nestling.ops.triton.launch import padded, warps
from nestling.ops.triton.tiles import load_tile, store_tile


@triton.jit
def bounded_forward(weight, out, limit, outs, ins, O: tl.constexpr, I: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * outs * ins
    w = load_tile(weight + at, outs, ins, ins, O, I)
    norm = tl.sqrt(tl.sum(tl.sum(w * w, 1), 0))
    store_tile(out + at, w * (limit / tl.maximum(norm, limit)), outs, ins, ins, O, I)


@triton.jit
def bounded_backward(weight, grad, out, limit, outs, ins, O: tl.constexpr, I: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * outs * ins
    w, g = load_tile(weight + at, outs, ins, ins, O, I), load_tile(grad + at, outs, ins, ins, O, I)
    norm = tl.sqrt(tl.sum(tl.sum(w * w, 1), 0))
    most = tl.maximum(norm, limit)
    along = tl.where(norm >= limit, tl.sum(tl.sum(w * g, 1), 0) * limit / (most * most * most), 0.0)
    store_tile(out + at, g * (limit / most) - w * along, outs, ins, ins, O, I)


def bounded(weight: Tensor, limit: float) -> Tensor:
    """weight [..., o, i], scaled down where its norm exceeds `limit`."""
    return _forward(weight.contiguous(), limit)


def plain(weight: Tensor, limit: float) -> Tensor:
    """The same in plain operations."""
    norm = torch.linalg.vector_norm(weight, dim=(-2, -1), keepdim=True)
    return weight * (limit / norm.clamp_min(limit))


def _launch(kernel, weight: Tensor, *others: Tensor, limit: float) -> None:
    outs, ins = weight.shape[-2:]
    tiles = padded(outs), padded(ins)
    kernel[(weight.numel() // (outs * ins),)](
        weight, *others, limit, outs, ins, O=tiles[0], I=tiles[1], num_warps=warps(64, *tiles)
    )  # fmt: skip


@torch.library.custom_op("nestling::bounded", mutates_args=(), schema="(Tensor weight, float limit) -> Tensor")
def _forward(weight, limit):
    out = torch.empty_like(weight)
    _launch(bounded_forward, weight, out, limit=limit)
    return out


@torch.library.custom_op(
    "nestling::bounded_backward", mutates_args=(), schema="(Tensor weight, Tensor grad, float limit) -> Tensor"
)
def _backward(weight, grad, limit):
    out = torch.empty_like(weight)
    _launch(bounded_backward, weight, grad.contiguous(), out, limit=limit)
    return out


@_forward.register_fake
def _(weight, limit):
    return torch.empty_like(weight)


@_backward.register_fake
def _(weight, grad, limit):
    return torch.empty_like(weight)


def _setup(ctx, inputs, output):
    ctx.limit = inputs[1]
    ctx.save_for_backward(inputs[0])


def _autograd(ctx, grad):
    (weight,) = ctx.saved_tensors
    if torch.is_grad_enabled():  # a second derivative is wanted
        return *differentiate(lambda w: (plain(w, ctx.limit),), (weight,), (grad,), ctx.needs_input_grad[:1]), None
    return _backward(weight, grad, ctx.limit), None


_forward.register_autograd(_autograd, setup_context=_setup)
