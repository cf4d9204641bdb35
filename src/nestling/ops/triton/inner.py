"""What an MLP memory's chunk step does around its two delta rules, one memory per program: memory/fused.py's equations.

Layer 2 is the first layer (W2 [h, p]), layer 1 the second (W1 [p, h]), as in NL Eq. 89.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nestling.ops.triton.tiles import load_row, load_tile, mm, mm_t, sigmoid, store_row, store_tile, t_mm


@triton.jit
def inner_tiles(k, v, up, down, base, P: tl.constexpr):
    """W2 v, W2 k, its silu, M(k) - M(v), W1 silu(W2 k), W1^T error, layer 2's error; the step's sizes and rate."""
    pre_values = mm_t(v, up, P)
    e = k - v - mm_t(pre_values * sigmoid(pre_values), down, P)
    pre = mm_t(k, up, P)
    s = sigmoid(pre)
    h = pre * s
    out = mm_t(h, down, P)
    e += out
    pull = mm(e, down, P)
    e2 = pull * (s + s * (pre - h))
    h_size, key_size, size1, size2 = tl.sum(h * h, 1), tl.sum(k * k, 1), tl.sum(e * e, 1) + 1e-6, tl.sum(e2 * e2, 1)
    rate = base / (1 + base * (h_size + key_size * (1 + size2 / size1)))
    return pre_values, pre, h, e, out, pull, e2, h_size, key_size, size1, size2, rate


@triton.jit
def inner_gradient(
    k, v, up, down, pre, pre_values, err, pull, base, rate, shrink, h_size, key_size, size1, size2,
    g_h, g_k, g_e2, g_e, g_rate, g_pre, g_out, g_up, g_down, P: tl.constexpr,
):  # fmt: skip
    """Gradients of W2, W1, k, v, eta and mu from those of the two delta rules.

    Those are g_h to g_down: of keys h and k, writes of the first layer and the second, both rates of erase, products of
    the first and the second, and what the weights have already.
    """
    # the step: e = eta / (1 + eta kappa), kappa = |h|^2 + |k|^2 (1 + |error2|^2 / |error|^2); u = -e (1 - mu) error
    s = sigmoid(pre)
    h = pre * s
    slope = s + s * (pre - h)
    e2 = pull * slope
    reach = tl.sum(g_e * err, 1) + tl.sum(g_e2 * e2, 1)
    scale = -rate * shrink
    g_rate -= reach * shrink
    g_mu = reach * rate
    ratio = size2 / size1
    whole = 1 + base * (h_size + key_size * (1 + ratio))
    g_eta = g_rate / (whole * whole)
    g_kappa = -2 * rate * rate * g_rate
    g_ratio = g_kappa * key_size / size1
    g_e = g_e * scale[:, None] - err * (g_ratio * ratio)[:, None]
    g_e2 = g_e2 * scale[:, None] + e2 * g_ratio[:, None]
    # error2 = (W1^T error) silu'(W2 k)
    g_pull = g_e2 * slope
    g_pre += g_e2 * pull * (s * (1 - s) * (2 + pre - 2 * h))
    g_e += mm_t(g_pull, down, P)
    g_down += t_mm(err, g_pull, P)
    # error = M(k) - M(v); W1's products for the keys serve the recurrence too
    g_out += g_e
    g_down += t_mm(g_out, h, P)
    g_pre += (mm(g_out, down, P) + g_h + h * g_kappa[:, None]) * slope
    s = sigmoid(pre_values)
    h = pre_values * s
    g_down -= t_mm(g_e, h, P)
    g_pre_values = mm(g_e, down, P) * (s + s * (pre_values - h)) * -1.0
    g_up += t_mm(g_pre, k, P) + t_mm(g_pre_values, v, P)
    g_k += k * (g_kappa * (1 + ratio))[:, None] + g_e + mm(g_pre, up, P)
    return g_up, g_down, g_k, mm(g_pre_values, up, P) - g_e, g_eta, g_mu


@triton.jit
def inner_forward(
    w2, w1, keys, values, eta, mu,
    pre_keys, pre_values, hidden, error, pulled, out_keys, sizes, writes2, writes1, rate_out,
    tokens, inner, width, groups, total,
    C: tl.constexpr, I: tl.constexpr, H: tl.constexpr, MOVES: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Forward of keys and values, the error, each layer's gradient and the step e of memory `n`."""
    n = tl.program_id(0).to(tl.int64)
    g = n % groups
    cells, narrow, wide, line = n * inner * width, n * tokens * inner, n * tokens * width, n * tokens
    k = load_tile(keys + g * tokens * inner, tokens, inner, inner, C, I)
    v = load_tile(values + g * tokens * inner, tokens, inner, inner, C, I)
    up, down = load_tile(w2 + cells, width, inner, inner, H, I), load_tile(w1 + cells, inner, width, width, I, H)
    pre_v, pre, h, e, out, pull, e2, h_size, key_size, size1, size2, rate = inner_tiles(
        k, v, up, down, load_row(eta + g * tokens, tokens, 1, C), P
    )
    store_tile(pre_values + wide, pre_v, tokens, width, width, C, H)
    store_tile(pre_keys + wide, pre, tokens, width, width, C, H)
    store_tile(hidden + wide, h, tokens, width, width, C, H)
    store_tile(out_keys + narrow, out, tokens, inner, inner, C, I)
    store_tile(error + narrow, e, tokens, inner, inner, C, I)
    store_tile(pulled + wide, pull, tokens, width, width, C, H)
    store_row(sizes + line, h_size, tokens, 1, C)
    store_row(sizes + total + line, key_size, tokens, 1, C)
    store_row(sizes + 2 * total + line, size1, tokens, 1, C)
    store_row(sizes + 3 * total + line, size2, tokens, 1, C)
    store_row(rate_out + line, rate, tokens, 1, C)
    scale = -rate
    if MOVES:
        scale *= 1 - load_row(mu + g * tokens, tokens, 1, C)
    store_tile(writes2 + wide, e2 * scale[:, None], tokens, width, width, C, H)
    store_tile(writes1 + narrow, e * scale[:, None], tokens, inner, inner, C, I)


@triton.jit
def inner_backward(
    w2, w1, keys, values, eta, mu, pre_keys, pre_values, error, pulled, sizes, rate_in,
    g_hidden, g_keys2, g_writes2, g_writes1, g_erase2, g_erase1, g_products2, g_products1,
    g_w2, g_w1, g_keys, g_values, g_eta, g_mu,
    tokens, inner, width, groups, total, stride,
    C: tl.constexpr, I: tl.constexpr, H: tl.constexpr, MOVES: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The gradient from those of the two delta rules; g_w2 and g_w1 are added to.

    g_keys to g_mu are memory `n`'s share of what all memories of a head were given, `stride` apart.
    """
    n = tl.program_id(0).to(tl.int64)
    g, share = n % groups, n * stride
    cells, narrow, wide, line = n * inner * width, n * tokens * inner, n * tokens * width, n * tokens
    k = load_tile(keys + g * tokens * inner, tokens, inner, inner, C, I)
    v = load_tile(values + g * tokens * inner, tokens, inner, inner, C, I)
    up, down = load_tile(w2 + cells, width, inner, inner, H, I), load_tile(w1 + cells, inner, width, width, I, H)
    shrink = tl.full([C], 1.0, tl.float32)
    if MOVES:
        shrink -= load_row(mu + g * tokens, tokens, 1, C)
    size1 = tl.where(tl.arange(0, C) < tokens, load_row(sizes + 2 * total + line, tokens, 1, C), 1.0)
    found_up, found_down, g_k, g_v, found_eta, found_mu = inner_gradient(
        k, v, up, down, load_tile(pre_keys + wide, tokens, width, width, C, H),
        load_tile(pre_values + wide, tokens, width, width, C, H), load_tile(error + narrow, tokens, inner, inner, C, I),
        load_tile(pulled + wide, tokens, width, width, C, H), load_row(eta + g * tokens, tokens, 1, C),
        load_row(rate_in + line, tokens, 1, C), shrink, load_row(sizes + line, tokens, 1, C),
        load_row(sizes + total + line, tokens, 1, C), size1, load_row(sizes + 3 * total + line, tokens, 1, C),
        load_tile(g_hidden + wide, tokens, width, width, C, H), load_tile(g_keys2 + narrow, tokens, inner, inner, C, I),
        load_tile(g_writes2 + wide, tokens, width, width, C, H),
        load_tile(g_writes1 + narrow, tokens, inner, inner, C, I),
        load_row(g_erase1 + line, tokens, 1, C) + load_row(g_erase2 + line, tokens, 1, C),
        load_tile(g_products2 + wide, tokens, width, width, C, H),
        load_tile(g_products1 + narrow, tokens, inner, inner, C, I),
        load_tile(g_w2 + cells, width, inner, inner, H, I), load_tile(g_w1 + cells, inner, width, width, I, H), P,
    )  # fmt: skip
    store_tile(g_w2 + cells, found_up, width, inner, inner, H, I)
    store_tile(g_w1 + cells, found_down, inner, width, width, I, H)
    store_tile(g_keys + share, g_k, tokens, inner, inner, C, I)
    store_tile(g_values + share, g_v, tokens, inner, inner, C, I)
    store_row(g_eta + share, found_eta, tokens, 1, C)
    if MOVES:
        store_row(g_mu + share, found_mu, tokens, 1, C)
