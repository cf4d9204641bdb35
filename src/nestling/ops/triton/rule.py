"""The delta rule over one chunk, one memory per program: the equations of ops/chunk.py."""

from __future__ import annotations

import triton
import triton.language as tl

from nestling.ops.triton.tiles import load_row, load_tile, mm, mm_t, sigmoid, store_tile, t_mm, unit_inverse


@triton.jit
def chunk_forward(
    weight, velocity, products, keys, writes, erase, decay, mixed, momentum, queries, anchor, residual,
    new_weight, new_velocity, reads, d_out, inverse_out,
    tokens, outs, ins, key_groups, groups, first_read,
    C: tl.constexpr, O: tl.constexpr, I: tl.constexpr, LEVELS: tl.constexpr, MOVES: tl.constexpr,
    ANCHOR: tl.constexpr, ERASE: tl.constexpr, READ: tl.constexpr, AFTER: tl.constexpr, ACTIVE: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """W, S, reads, d and the system's inverse of memory `n`.

    Keys belong to memory n modulo `key_groups`, tables and rates of erase to n modulo `groups`. ACTIVE: the queries are
    silu(queries), and `residual` is added to the reads.
    """
    n = tl.program_id(0).to(tl.int64)
    side = tokens + 1
    table = (n % groups) * side * side
    rows, cells, size = n * tokens * outs, n * outs * ins, tokens * ins
    x = load_tile(keys + (n % key_groups) * size, tokens, ins, ins, C, I)
    u = load_tile(writes + rows, tokens, outs, outs, C, O)
    decay += table
    mixed += table
    momentum += table
    d = u
    if ERASE:
        beta = load_row(erase + n * tokens, tokens, 1, C)[:, None]
        gram = mm_t(x, x, P)
        a0 = load_row(decay, tokens, side, C)[:, None]
        base = load_tile(products + rows, tokens, outs, outs, C, O) * a0
        if ANCHOR:
            base += mm_t(x, load_tile(anchor + cells, outs, ins, ins, O, I), P) * (1 - a0)
        if MOVES:
            k0 = load_row(mixed, tokens, side, C)[:, None]
            base += mm_t(x, load_tile(velocity + cells, outs, ins, ins, O, I), P) * k0
            base += mm(gram * load_tile(mixed + 1, tokens, tokens, side, C, C), u, P)
        lower = gram * load_tile(decay + 1, tokens, tokens, side, C, C) * beta
        inverse = unit_inverse(lower, C, LEVELS, P)
        d = mm(inverse, u - base * beta, P)
        store_tile(inverse_out + n * tokens * tokens, inverse, tokens, tokens, tokens, C, C)
        store_tile(d_out + rows, d, tokens, outs, outs, C, O)

    last = tokens * side
    ac = tl.load(decay + last).to(tl.float32)
    left = d * load_row(decay + last + 1, tokens, 1, C)[:, None]
    w = load_tile(weight + cells, outs, ins, ins, O, I) * ac
    if ANCHOR:
        w += load_tile(anchor + cells, outs, ins, ins, O, I) * (1 - ac)
    if MOVES:
        s = load_tile(velocity + cells, outs, ins, ins, O, I)
        w += s * tl.load(mixed + last).to(tl.float32)
        left += u * load_row(mixed + last + 1, tokens, 1, C)[:, None]
        kept = u * load_row(momentum + last + 1, tokens, 1, C)[:, None]
        s = s * tl.load(momentum + last).to(tl.float32) + t_mm(kept, x, P)
        store_tile(new_velocity + cells, s, outs, ins, ins, O, I)
    w += t_mm(left, x, P)
    store_tile(new_weight + cells, w, outs, ins, ins, O, I)

    if READ:  # noqa: SIM102 (the compiler decides this one, the program the next)
        if n >= first_read:
            line = 0
            if AFTER:
                line = side
            at = n - first_read
            q = load_tile(queries + at * size, tokens, ins, ins, C, I)
            if ACTIVE:
                q = q * sigmoid(q)
            scores = mm_t(q, x, P)
            a0 = load_row(decay + line, tokens, side, C)[:, None]
            y = mm_t(q, load_tile(weight + cells, outs, ins, ins, O, I), P) * a0
            if ANCHOR:
                y += mm_t(q, load_tile(anchor + cells, outs, ins, ins, O, I), P) * (1 - a0)
            if MOVES:
                k0 = load_row(mixed + line, tokens, side, C)[:, None]
                y += mm_t(q, load_tile(velocity + cells, outs, ins, ins, O, I), P) * k0
                y += mm(scores * load_tile(mixed + line + 1, tokens, tokens, side, C, C), u, P)
            y += mm(scores * load_tile(decay + line + 1, tokens, tokens, side, C, C), d, P)
            if ACTIVE:
                y += load_tile(residual + at * tokens * outs, tokens, outs, outs, C, O)
            store_tile(reads + at * tokens * outs, y, tokens, outs, outs, C, O)
