"""A chunk of an MLP memory in one program each way: what one step makes for the next stays with the program.

The same equations as `inner` and `rule` by launches of their own. Weights are loaded again where keeping them would
take more shared memory than an H100 has. The backward pass keeps W2 k, the error, the rate and what each layer's rule
solved, and makes the rest anew.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nestling.ops.triton.inner import inner_gradient, inner_tiles
from nestling.ops.triton.rule import end_of_chunk, read, solve
from nestling.ops.triton.rule_backward import gradient
from nestling.ops.triton.tiles import load_row, load_tile, mm, mm_t, sigmoid, store_row, store_tile


@triton.jit
def step_forward(
    w2, w1, s2, s1, keys, values, queries, eta, mu, decay, mixed, momentum, anchor2, anchor1,
    new_w2, new_w1, new_s2, new_s1, reads, pre_out, error_out, rate_out, d2_out, inverse2_out, d1_out, inverse1_out,
    read_out, tokens, inner, width, groups, first_read,
    C: tl.constexpr, I: tl.constexpr, H: tl.constexpr, LEVELS: tl.constexpr, MOVES: tl.constexpr,
    ANCHOR: tl.constexpr, READ: tl.constexpr, AFTER: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The chunk step of memory `n`: new weights and velocities, reads, and what `step_backward` needs."""
    n = tl.program_id(0).to(tl.int64)
    g, side = n % groups, tokens + 1
    cells, narrow, wide, line = n * inner * width, n * tokens * inner, n * tokens * width, n * tokens
    decay += g * side * side
    mixed += g * side * side
    momentum += g * side * side
    k = load_tile(keys + g * tokens * inner, tokens, inner, inner, C, I)
    v = load_tile(values + g * tokens * inner, tokens, inner, inner, C, I)
    up, down = load_tile(w2 + cells, width, inner, inner, H, I), load_tile(w1 + cells, inner, width, width, I, H)
    base = load_row(eta + g * tokens, tokens, 1, C)
    _, pre, h, e, out, _, e2, _, _, _, _, rate = inner_tiles(k, v, up, down, base, P)
    store_tile(pre_out + wide, pre, tokens, width, width, C, H)
    store_tile(error_out + narrow, e, tokens, inner, inner, C, I)
    store_row(rate_out + line, rate, tokens, 1, C)
    scale = -rate
    if MOVES:
        scale *= 1 - load_row(mu + g * tokens, tokens, 1, C)
    u2, u1 = e2 * scale[:, None], e * scale[:, None]
    at, asks = n - first_read, n >= first_read
    line_read = 0
    if AFTER:
        line_read = side

    s, a = up, up
    if MOVES:
        s = load_tile(s2 + cells, width, inner, inner, H, I)
    if ANCHOR:
        a = load_tile(anchor2 + cells, width, inner, inner, H, I)
    d, inverse = solve(k, u2, pre, rate, s, a, decay, mixed, tokens, C, LEVELS, MOVES, ANCHOR, P)
    store_tile(d2_out + wide, d, tokens, width, width, C, H)
    store_tile(inverse2_out + line * tokens, inverse, tokens, tokens, tokens, C, C)
    new, moved = end_of_chunk(k, u2, d, up, s, a, decay, mixed, momentum, tokens, C, MOVES, ANCHOR, P)
    store_tile(new_w2 + cells, new, width, inner, inner, H, I)
    if MOVES:
        store_tile(new_s2 + cells, moved, width, inner, inner, H, I)
    q = h
    if READ:  # noqa: SIM102 (the compiler decides this one, the program the next)
        if asks:
            q = load_tile(queries + at * tokens * inner, tokens, inner, inner, C, I)
            q = read(q, k, u2, d, up, s, a, decay, mixed, line_read, tokens, C, MOVES, ANCHOR, P)
            store_tile(read_out + at * tokens * width, q, tokens, width, width, C, H)

    down = load_tile(w1 + cells, inner, width, width, I, H)  # again: kept, it would take shared memory from the rule
    s, a = down, down
    if MOVES:
        s = load_tile(s1 + cells, inner, width, width, I, H)
    if ANCHOR:
        a = load_tile(anchor1 + cells, inner, width, width, I, H)
    d, inverse = solve(h, u1, out, rate, s, a, decay, mixed, tokens, C, LEVELS, MOVES, ANCHOR, P)
    store_tile(d1_out + narrow, d, tokens, inner, inner, C, I)
    store_tile(inverse1_out + line * tokens, inverse, tokens, tokens, tokens, C, C)
    new, moved = end_of_chunk(h, u1, d, down, s, a, decay, mixed, momentum, tokens, C, MOVES, ANCHOR, P)
    store_tile(new_w1 + cells, new, inner, width, width, I, H)
    if MOVES:
        store_tile(new_s1 + cells, moved, inner, width, width, I, H)
    if READ:  # noqa: SIM102
        if asks:
            q = q * sigmoid(q)
            y = read(q, h, u1, d, down, s, a, decay, mixed, line_read, tokens, C, MOVES, ANCHOR, P)
            y += load_tile(queries + at * tokens * inner, tokens, inner, inner, C, I)
            store_tile(reads + at * tokens * inner, y, tokens, inner, inner, C, I)


@triton.jit
def step_backward(
    w2, w1, s2, s1, keys, values, queries, eta, mu, decay, mixed, momentum, anchor2, anchor1,
    pre_in, error_in, rate_in, d2_in, inverse2_in, d1_in, inverse1_in, read_in,
    g_new_w2, g_new_w1, g_new_s2, g_new_s1, g_reads,
    g_w2, g_w1, g_s2, g_s1, g_queries, g_anchor2, g_anchor1,
    g_keys, g_values, g_eta, g_mu, g_decay, g_mixed, g_momentum, g_read,
    tokens, inner, width, groups, first_read, stride,
    C: tl.constexpr, I: tl.constexpr, H: tl.constexpr, MOVES: tl.constexpr, ANCHOR: tl.constexpr, READ: tl.constexpr,
    AFTER: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The gradient of `step_forward`; g_keys to g_momentum are memory `n`'s share, `stride` apart."""
    n = tl.program_id(0).to(tl.int64)
    g, side, share = n % groups, tokens + 1, n * stride
    cells, narrow, wide, line = n * inner * width, n * tokens * inner, n * tokens * width, n * tokens
    at, asks = n - first_read, n >= first_read
    decay += g * side * side
    mixed += g * side * side
    momentum += g * side * side
    k = load_tile(keys + g * tokens * inner, tokens, inner, inner, C, I)
    down = load_tile(w1 + cells, inner, width, width, I, H)
    shrink = tl.full([C], 1.0, tl.float32)
    if MOVES:
        shrink -= load_row(mu + g * tokens, tokens, 1, C)
    # what the forward pass had
    pre = load_tile(pre_in + wide, tokens, width, width, C, H)
    e = load_tile(error_in + narrow, tokens, inner, inner, C, I)
    rate, base = load_row(rate_in + line, tokens, 1, C), load_row(eta + g * tokens, tokens, 1, C)
    bent = sigmoid(pre)
    h = pre * bent
    out, pull = mm_t(h, down, P), mm(e, down, P)
    e2 = pull * (bent + bent * (pre - h))
    h_size, key_size, size1, size2 = tl.sum(h * h, 1), tl.sum(k * k, 1), tl.sum(e * e, 1) + 1e-6, tl.sum(e2 * e2, 1)
    scale = -rate * shrink

    # the second layer's rule, whose read is the last thing computed, then the first layer's
    g_w = load_tile(g_new_w1 + cells, inner, width, width, I, H)
    g_s = g_w
    if MOVES:
        g_s = load_tile(g_new_s1 + cells, inner, width, width, I, H)
    g_s, g_a, g_out, g_h, g_u1, g_e1 = gradient(
        h, e * scale[:, None], load_tile(d1_in + narrow, tokens, inner, inner, C, I), out, rate, g_w, g_s,
        w1 + cells, s1 + cells, anchor1 + cells, inverse1_in + line * tokens, decay, mixed, momentum,
        read_in + at * tokens * width, read_in, g_reads + at * tokens * inner, g_w1 + cells,
        g_decay + share, g_mixed + share, g_momentum + share, g_read + at * tokens * width, asks, tokens, inner, width,
        C, I, H, MOVES, ANCHOR, True, READ, AFTER, True, False, False, True, P,
    )  # fmt: skip
    if MOVES:
        store_tile(g_s1 + cells, g_s, inner, width, width, I, H)
    if ANCHOR:
        store_tile(g_anchor1 + cells, g_a, inner, width, width, I, H)
    tl.debug_barrier()  # what follows reads and adds to what other threads have written
    g_w = load_tile(g_new_w2 + cells, width, inner, inner, H, I)
    g_s = g_w
    if MOVES:
        g_s = load_tile(g_new_s2 + cells, width, inner, inner, H, I)
    g_s, g_a, g_pre, g_k, g_u2, g_e2 = gradient(
        k, e2 * scale[:, None], load_tile(d2_in + wide, tokens, width, width, C, H), pre, rate, g_w, g_s,
        w2 + cells, s2 + cells, anchor2 + cells, inverse2_in + line * tokens, decay, mixed, momentum,
        queries + at * tokens * inner, g_reads + at * tokens * inner, g_read + at * tokens * width, g_w2 + cells,
        g_decay + share, g_mixed + share, g_momentum + share, g_queries + at * tokens * inner, asks,
        tokens, width, inner,
        C, H, I, MOVES, ANCHOR, True, READ, AFTER, False, True, True, True, P,
    )  # fmt: skip
    if MOVES:
        store_tile(g_s2 + cells, g_s, width, inner, inner, H, I)
    if ANCHOR:
        store_tile(g_anchor2 + cells, g_a, width, inner, inner, H, I)
    tl.debug_barrier()

    up, down = load_tile(w2 + cells, width, inner, inner, H, I), load_tile(w1 + cells, inner, width, width, I, H)
    v = load_tile(values + g * tokens * inner, tokens, inner, inner, C, I)
    found_up, found_down, g_k, g_v, found_eta, found_mu = inner_gradient(
        k, v, up, down, pre, mm_t(v, up, P), e, pull, base, rate, shrink, h_size, key_size, size1, size2,
        g_h, g_k, g_u2, g_u1, g_e1 + g_e2, g_pre, g_out, load_tile(g_w2 + cells, width, inner, inner, H, I),
        load_tile(g_w1 + cells, inner, width, width, I, H), P,
    )  # fmt: skip
    store_tile(g_w2 + cells, found_up, width, inner, inner, H, I)
    store_tile(g_w1 + cells, found_down, inner, width, width, I, H)
    store_tile(g_keys + share, g_k, tokens, inner, inner, C, I)
    store_tile(g_values + share, g_v, tokens, inner, inner, C, I)
    store_row(g_eta + share, found_eta, tokens, 1, C)
    if MOVES:
        store_row(g_mu + share, found_mu, tokens, 1, C)
