"""The decay tables of a chunk, one head per program: the equations of `ops.chunk._decay_table` and its gradient.

A table over tokens 0..C is [[1, 0], [first, B]]: a column `first` of products from the chunk's start, and B [C, C].
"""

from __future__ import annotations

import triton
import triton.language as tl

from nestling.ops.triton.tiles import load_row, load_tile, mm, mm_t, store_row, store_tile, t_mm


@triton.jit
def _products(at, tokens, C: tl.constexpr):
    """B[t, j] = prod_{s=j+1..t} a_s for t >= j, else 0, and `first`; 0 from row `tokens` on."""
    a = load_row(at, tokens, 1, C)
    t = tl.arange(0, C)
    later = t[:, None] > t[None, :]
    block = tl.cumprod(tl.where(later, a[:, None], 1.0), 0)
    inside = (t[:, None] >= t[None, :]) & (t[:, None] < tokens)
    return tl.where(inside, block, 0.0), tl.where(t < tokens, tl.cumprod(a, 0), 0.0)


@triton.jit
def _store(at, block, first, corner, tokens, C: tl.constexpr):
    side = tokens + 1
    store_tile(at + side + 1, block, tokens, tokens, side, C, C)
    store_row(at + side, first, tokens, side, C)
    store_row(at + 1, first * 0.0, tokens, 1, C)
    tl.store(at, corner)


@triton.jit
def table_forward(
    decay, momentum, out_decay, out_mixed, out_momentum, tokens, C: tl.constexpr, MOVES: tl.constexpr, P: tl.constexpr
):
    g = tl.program_id(0).to(tl.int64)
    at = g * (tokens + 1) * (tokens + 1)
    a, first = _products(decay + g * tokens, tokens, C)
    _store(out_decay + at, a, first, 1.0, tokens, C)
    if MOVES:
        m, start = _products(momentum + g * tokens, tokens, C)
        _store(out_momentum + at, m, start, 1.0, tokens, C)
        _store(out_mixed + at, mm(a, m, P) - a, tl.sum(a * start[None, :], 1), 0.0, tokens, C)


@triton.jit
def _of_factors(table, block, grad, g_first, tokens, C: tl.constexpr, P: tl.constexpr):
    """da_s = sum_{j < s <= t} grad[t, j] A[t, s] A[s - 1, j]."""
    side = tokens + 1
    before, start = load_tile(table + 1, tokens, tokens, side, C, C), load_row(table, tokens, side, C)
    return tl.sum(block * (mm_t(grad, before, P) + g_first[:, None] * start[None, :]), 0)


@triton.jit
def table_backward(
    table_decay, table_momentum, g_table, g_mixed, g_table_momentum, g_decay, g_momentum, tokens,
    C: tl.constexpr, MOVES: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0).to(tl.int64)
    side = tokens + 1
    at = g * side * side
    inner = at + side + 1
    a = load_tile(table_decay + inner, tokens, tokens, side, C, C)
    grad, g_first = (
        load_tile(g_table + inner, tokens, tokens, side, C, C),
        load_row(g_table + at + side, tokens, side, C),
    )
    t = tl.arange(0, C)
    lower = t[:, None] >= t[None, :]
    if MOVES:
        m, start = (
            load_tile(table_momentum + inner, tokens, tokens, side, C, C),
            load_row(table_momentum + at + side, tokens, side, C),
        )
        mixed = tl.where(lower, load_tile(g_mixed + inner, tokens, tokens, side, C, C), 0.0)
        mixed_first = load_row(g_mixed + at + side, tokens, side, C)
        grad += mm_t(mixed, m, P) + mixed_first[:, None] * start[None, :] - mixed
        g_m = load_tile(g_table_momentum + inner, tokens, tokens, side, C, C) + t_mm(a, mixed, P)
        g_m_first = load_row(g_table_momentum + at + side, tokens, side, C) + tl.sum(a * mixed_first[:, None], 0)
        found = _of_factors(table_momentum + at, m, tl.where(lower, g_m, 0.0), g_m_first, tokens, C, P)
        store_row(g_momentum + g * tokens, found, tokens, 1, C)
    found = _of_factors(table_decay + at, a, tl.where(lower, grad, 0.0), g_first, tokens, C, P)
    store_row(g_decay + g * tokens, found, tokens, 1, C)
