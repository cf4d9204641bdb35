"""Floating-point operations of a call, counted where torch's own counter does not look."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from nestling.ops import compiled


def _in_place_product(self_shape, a_shape, b_shape, *args, out_shape=None, **kwargs) -> int:
    batch, rows, inner = a_shape
    return 2 * batch * rows * inner * b_shape[-1]


def _triangular(a_shape, b_shape, *args, out_shape=None, **kwargs) -> int:
    """n^2 multiply-adds per right-hand side, halved by the triangle."""
    total = 1
    for size in b_shape:
        total *= size
    return total * a_shape[-1]


def _causal_attention(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    """Scores and their product with the values, half of each masked away."""
    batch, heads, tokens, size = q_shape
    return 2 * batch * heads * tokens * k_shape[-2] * size


def _causal_attention_backward(grad_shape, q_shape, k_shape, *args, out_shape=None, **kwargs) -> int:
    """Scores anew, and the gradients of values, weights, queries and keys."""
    return 5 * _causal_attention(q_shape, k_shape, k_shape) // 2


def count_flops(function: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products (and triangular solves) of a call; a multiply-add is two."""
    aten = torch.ops.aten
    extra = {
        aten.baddbmm_: _in_place_product,
        aten.linalg_solve_triangular: _triangular,
        aten._scaled_dot_product_flash_attention_for_cpu: _causal_attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _causal_attention_backward,
    }
    # the compiled forms do the same products, but no counter sees them
    with compiled.disabled(), FlopCounterMode(display=False, custom_mapping=extra) as counter:
        function()
    return counter.get_total_flops()
