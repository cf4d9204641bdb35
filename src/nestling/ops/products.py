"""Products of a chunk's decays between any two tokens, in the two ways that suit a CPU and a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def products(a: Tensor) -> Tensor:
    """A [..., C + 1, C + 1] of a [..., C], by running products."""
    size = a.shape[-1] + 1
    # factors[j, t] = a_t where t > j, else 1: a running product along t gives A^T
    later = torch.ones(size, size, dtype=torch.bool, device=a.device).triu(1)
    factors = torch.nn.functional.pad(a, (1, 0), value=1.0).unsqueeze(-2).masked_fill(~later, 1.0)
    return factors.cumprod(-1).triu_().transpose(-1, -2).contiguous()


def products_by_blocks(a: Tensor) -> Tensor:
    """`products` for C a power of two: a block below the diagonal is an outer product, A[t, m] a_m A[m - 1, j].

    On a GPU, where running products take five times as long.
    """
    size, a = a.shape[-1], a.contiguous()
    table = a.new_zeros(*a.shape[:-1], size + 1, size + 1)
    table.diagonal(dim1=-2, dim2=-1).fill_(1)
    core, block = table[..., 1:, 1:], 1
    while block < size:
        count = size // (2 * block)
        pairs = core.unflatten(-1, (count, 2, block)).unflatten(-4, (count, 2, block))
        pairs = pairs.diagonal(dim1=-6, dim2=-3)  # [..., 2, block, 2, block, count]
        first = a.unflatten(-1, (count, 2, block))[..., 1, 0]
        below = pairs[..., 1, :, 1, 0, :] * first.unsqueeze(-2)
        pairs[..., 1, :, 0, :, :].copy_(below.unsqueeze(-2) * pairs[..., 0, -1, 0, :, :].unsqueeze(-3))
        block *= 2
    table[..., 1:, 0] = core[..., 0] * a[..., :1]
    return table
