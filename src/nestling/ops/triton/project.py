"""Outputs of MLP memories for the tokens of a chunk, x + W1 silu(W2 x), `nestling::project`: one launch each way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nestling.ops.chunk import differentiate
from nestling.ops.triton.launch import padded, precision, warps
from nestling.ops.triton.tiles import load_tile, mm, mm_t, sigmoid, store_tile, t_mm


@triton.jit
def project_forward(
    w2, w1, x, y, pre_out, tokens, inner, width, groups,
    C: tl.constexpr, I: tl.constexpr, H: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Memory `n` reads the rows of group n modulo `groups`."""
    n = tl.program_id(0).to(tl.int64)
    cells, narrow = n * inner * width, n * tokens * inner
    rows = load_tile(x + (n % groups) * tokens * inner, tokens, inner, inner, C, I)
    pre = mm_t(rows, load_tile(w2 + cells, width, inner, inner, H, I), P)
    store_tile(pre_out + n * tokens * width, pre, tokens, width, width, C, H)
    out = rows + mm_t(pre * sigmoid(pre), load_tile(w1 + cells, inner, width, width, I, H), P)
    store_tile(y + narrow, out, tokens, inner, inner, C, I)


@triton.jit
def project_backward(
    w2, w1, x, pre_in, g_y, g_w2, g_w1, g_x, tokens, inner, width, groups,
    C: tl.constexpr, I: tl.constexpr, H: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """g_x is memory `n`'s share."""
    n = tl.program_id(0).to(tl.int64)
    cells, narrow = n * inner * width, n * tokens * inner
    rows = load_tile(x + (n % groups) * tokens * inner, tokens, inner, inner, C, I)
    pre = load_tile(pre_in + n * tokens * width, tokens, width, width, C, H)
    g = load_tile(g_y + narrow, tokens, inner, inner, C, I)
    s = sigmoid(pre)
    h = pre * s
    store_tile(g_w1 + cells, t_mm(g, h, P), inner, width, width, I, H)
    g_pre = mm(g, load_tile(w1 + cells, inner, width, width, I, H), P) * (s + s * (pre - h))
    store_tile(g_w2 + cells, t_mm(g_pre, rows, P), width, inner, inner, H, I)
    g += mm(g_pre, load_tile(w2 + cells, width, inner, inner, H, I), P)
    store_tile(g_x + narrow, g, tokens, inner, inner, C, I)


def project(w2: Tensor, w1: Tensor, x: Tensor) -> Tensor:
    """Outputs [N, C, p] of N memories w2 [N, h, p], w1 [N, p, h] for x [G, C, p]; memory n reads group n modulo G."""
    return _forward(w2, w1, x)[0]


def plain(w2: Tensor, w1: Tensor, x: Tensor) -> Tensor:
    """The same in plain operations."""
    rows = x.repeat(w2.shape[0] // x.shape[0], 1, 1)
    return rows + torch.nn.functional.silu(rows @ w2.mT) @ w1.mT


def _launch(kernel, w2: Tensor, w1: Tensor, x: Tensor, *others: Tensor) -> None:
    total, width, inner = w2.shape
    groups, tokens, _ = x.shape
    tiles = padded(tokens), padded(inner), padded(width)
    kernel[(total,)](
        w2, w1, x, *others, tokens, inner, width, groups, C=tiles[0], I=tiles[1], H=tiles[2], P=precision(),
        num_warps=warps(*tiles), num_stages=1,
    )  # fmt: skip


def _places(w2: Tensor, w1: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    total, width, inner = w2.shape
    return w2.new_empty(total, x.shape[1], inner), w2.new_empty(total, x.shape[1], width)


@torch.library.custom_op("nestling::project", mutates_args=())
def _forward(w2: Tensor, w1: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    made = _places(w2, w1, x)
    _launch(project_forward, w2, w1, x, *made)
    return made


_forward.register_fake(_places)


@torch.library.custom_op("nestling::project_backward", mutates_args=())
def _backward(w2: Tensor, w1: Tensor, x: Tensor, pre: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    found = torch.empty_like(w2), torch.empty_like(w1), torch.empty_like(grad)
    _launch(project_backward, w2, w1, x, pre, grad, *found)
    return found


@_backward.register_fake
def _(w2, w1, x, pre, grad):
    return torch.empty_like(w2), torch.empty_like(w1), torch.empty_like(grad)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad, _):
    w2, w1, x, pre = ctx.saved_tensors
    if grad is None:
        return None, None, None
    if torch.is_grad_enabled():  # a second derivative is wanted
        return tuple(differentiate(lambda *a: (plain(*a),), (w2, w1, x), (grad,), ctx.needs_input_grad))
    g_w2, g_w1, shares = _backward(w2, w1, x, pre, grad.contiguous())
    g_x = shares.unflatten(0, (-1, x.shape[0])).sum(0) if len(shares) > len(x) else shares
    return g_w2, g_w1, g_x.to(x.dtype)


_forward.register_autograd(_autograd, setup_context=_setup)
