"""What a linear memory's chunk step does around its delta rule, one memory per program.

error = W k - W v, e = eta / (1 + eta |k|^2), u = -e (1 - mu) error.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nestling.ops.triton.tiles import add_tile, load_row, load_tile, mm, mm_t, store_row, store_tile, t_mm


@triton.jit
def linear_forward(
    weight, keys, values, eta, mu, products, error, writes, rate_out, tokens, outs, ins, groups,
    C: tl.constexpr, O: tl.constexpr, I: tl.constexpr, MOVES: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    g = n % groups
    rows = n * tokens * outs
    k = load_tile(keys + g * tokens * ins, tokens, ins, ins, C, I)
    v = load_tile(values + g * tokens * ins, tokens, ins, ins, C, I)
    w = load_tile(weight + n * outs * ins, outs, ins, ins, O, I)
    made = mm_t(k, w, P)
    e = made - mm_t(v, w, P)
    base = load_row(eta + g * tokens, tokens, 1, C)
    rate = base / (1 + base * tl.sum(k * k, 1))
    scale = -rate
    if MOVES:
        scale *= 1 - load_row(mu + g * tokens, tokens, 1, C)
    store_tile(products + rows, made, tokens, outs, outs, C, O)
    store_tile(error + rows, e, tokens, outs, outs, C, O)
    store_tile(writes + rows, e * scale[:, None], tokens, outs, outs, C, O)
    store_row(rate_out + n * tokens, rate, tokens, 1, C)


@triton.jit
def linear_backward(
    weight, keys, values, eta, mu, error, rate_in, g_products, g_keys2, g_writes, g_erase,
    g_weight, g_keys, g_values, g_eta, g_mu, tokens, outs, ins, groups, stride,
    C: tl.constexpr, O: tl.constexpr, I: tl.constexpr, MOVES: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """g_weight is added to; g_keys to g_mu are memory `n`'s share, `stride` apart."""
    n = tl.program_id(0).to(tl.int64)
    g = n % groups
    rows, share, cells = n * tokens * outs, n * stride, n * outs * ins
    k = load_tile(keys + g * tokens * ins, tokens, ins, ins, C, I)
    v = load_tile(values + g * tokens * ins, tokens, ins, ins, C, I)
    w = load_tile(weight + cells, outs, ins, ins, O, I)
    base, rate = load_row(eta + g * tokens, tokens, 1, C), load_row(rate_in + n * tokens, tokens, 1, C)
    g_u = load_tile(g_writes + rows, tokens, outs, outs, C, O)
    reach = tl.sum(g_u * load_tile(error + rows, tokens, outs, outs, C, O), 1)
    found, scale = load_row(g_erase + n * tokens, tokens, 1, C), rate
    if MOVES:
        shrink = 1 - load_row(mu + g * tokens, tokens, 1, C)
        found -= reach * shrink
        scale *= shrink
        store_row(g_mu + share, reach * rate, tokens, 1, C)
    else:
        found -= reach
    whole = 1 + base * tl.sum(k * k, 1)
    store_row(g_eta + share, found / (whole * whole), tokens, 1, C)
    g_target = g_u * scale[:, None]
    g_made = load_tile(g_products + rows, tokens, outs, outs, C, O) - g_target
    add_tile(g_weight + cells, t_mm(g_made, k, P) + t_mm(g_target, v, P), outs, ins, ins, O, I)
    g_k = load_tile(g_keys2 + n * tokens * ins, tokens, ins, ins, C, I) - k * (2 * rate * rate * found)[:, None]
    store_tile(g_keys + share, g_k + mm(g_made, w, P), tokens, ins, ins, C, I)
    store_tile(g_values + share, mm(g_target, w, P), tokens, ins, ins, C, I)
