"""Short causal depth-wise convolution with carried state."""

from __future__ import annotations

import torch
from torch import Tensor

from nestling.ops.padding import pack, unpack


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
    # K shifted products: on a CPU faster, forward and backward, than a grouped conv1d of width 4
    y = history[:, :tokens] * weight[:, 0]
    for k in range(1, size):
        y = torch.addcmul(y, history[:, k : k + tokens], weight[:, k])
    if bias is not None:
        y = y + bias
    if mask is None:
        return y, history[:, tokens:]
    last = lengths[:, None] + torch.arange(size - 1, device=x.device)
    return unpack(y, order), history.gather(1, last[..., None].expand(-1, -1, x.shape[2]))
