"""Short causal depth-wise convolution with carried state."""

from __future__ import annotations

import torch
from torch import Tensor

from nestling.ops import compiled
from nestling.ops.chunk import differentiate, unrounded
from nestling.ops.compiled import conv as compiled_conv
from nestling.ops.padding import pack, unpack
from nestling.utils.transforms import is_transformed


def short_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, state: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Causal depth-wise convolution y_t = sum_k weight[:, k] x_{t - (K - 1) + k} + bias.

    Args:
        x: [B, T, D].  weight: [D, K], the last tap on the current token.  bias: [D].
        state: the last K - 1 inputs before x, [B, K - 1, D]; None is a start from zeros.
        mask: [B, T] bool, True at real tokens; padding neither contributes nor enters the state.

    Returns:
        y [B, T, D] and the state [B, K - 1, D] after the last real token.
    """
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[-1]:
        raise ValueError(
            f"short_convolution needs x [B, T, D] and weight [D, K]; got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    size, tokens = weight.shape[1], x.shape[1]
    if state is None:
        state = x.new_zeros(x.shape[0], size - 1, x.shape[2])
    elif state.shape != (x.shape[0], size - 1, x.shape[2]):
        expected = (x.shape[0], size - 1, x.shape[2])
        raise ValueError(f"state has shape {tuple(state.shape)}, but this call needs {expected} [B, K - 1, D]")
    if mask is not None:
        x, order, lengths = pack(x, mask)
    history = torch.cat([state.to(x.dtype), x], 1)
    y = taps_reference(history, weight) if is_transformed() else _Taps.apply(history, weight)
    if bias is not None:
        y = y + bias
    if mask is None:
        return y, history[:, tokens:]
    last = lengths[:, None] + torch.arange(size - 1, device=x.device)
    return unpack(y, order), history.gather(1, last[..., None].expand(-1, -1, x.shape[2]))


def taps_reference(history: Tensor, weight: Tensor) -> Tensor:
    """y_t = sum_k weight[:, k] history_{t + k} for history [B, K - 1 + T, D], by K shifted products."""
    size = weight.shape[1]
    tokens = history.shape[1] - size + 1
    y = history[:, :tokens] * weight[:, 0]
    for k in range(1, size):
        y = torch.addcmul(y, history[:, k : k + tokens], weight[:, k])
    return y


class _Taps(torch.autograd.Function):
    """`taps_reference`, whose backward pass by autograd writes every tap's products: a third of a layer's time."""

    @staticmethod
    def forward(ctx, history, weight):
        history = history.contiguous()
        ctx.save_for_backward(history, weight)
        if compiled.is_available(history, weight):
            return compiled_conv.forward(history, weight)
        return taps_reference(history, weight)

    @staticmethod
    @unrounded
    def backward(ctx, grad):
        history, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            definition = lambda *a: (taps_reference(*a),)  # noqa: E731
            return tuple(differentiate(definition, (history, weight), (grad,), ctx.needs_input_grad))
        if compiled.is_available(history, weight, grad):
            return compiled_conv.backward(history, weight, grad.contiguous())
        back, own = torch.zeros_like(history), torch.empty_like(weight)
        for k in range(weight.shape[1]):
            seen = slice(k, k + grad.shape[1])
            back[:, seen].addcmul_(grad, weight[:, k])
            own[:, k] = (grad * history[:, seen]).sum((0, 1))
        return back, own
