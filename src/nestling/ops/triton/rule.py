"""The delta rule over one chunk, one memory per program: the equations of ops/chunk.py.

The pieces take tiles, so that what a memory holds can stay with its program: `whole` calls them for both layers of one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nestling.ops.triton.tiles import load_row, load_tile, mm, mm_t, sigmoid, store_tile, t_mm, unit_inverse


@triton.jit
def solve(
    x, u, products, rate, s, a, decay, mixed, tokens,
    C: tl.constexpr, LEVELS: tl.constexpr, MOVES: tl.constexpr, ANCHOR: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """What the tokens write, d, where each erases what the memory had, and the inverse of the system it solves.

    x, u, products are the keys, the writes asked for and W's products for the keys; s and a velocity and anchor.
    """
    side = tokens + 1
    beta = rate[:, None]
    gram = mm_t(x, x, P)
    a0 = load_row(decay, tokens, side, C)[:, None]
    base = products * a0
    if ANCHOR:
        base += mm_t(x, a, P) * (1 - a0)
    if MOVES:
        k0 = load_row(mixed, tokens, side, C)[:, None]
        base += mm_t(x, s, P) * k0
        base += mm(gram * load_tile(mixed + 1, tokens, tokens, side, C, C), u, P)
    lower = gram * load_tile(decay + 1, tokens, tokens, side, C, C) * beta
    inverse = unit_inverse(lower, C, LEVELS, P)
    return mm(inverse, u - base * beta, P), inverse


@triton.jit
def end_of_chunk(
    x, u, d, w, s, a, decay, mixed, momentum, tokens,
    C: tl.constexpr, MOVES: tl.constexpr, ANCHOR: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Weight and velocity after the chunk."""
    last = tokens * (tokens + 1)
    ac = tl.load(decay + last).to(tl.float32)
    left = d * load_row(decay + last + 1, tokens, 1, C)[:, None]
    w = w * ac
    if ANCHOR:
        w += a * (1 - ac)
    if MOVES:
        w += s * tl.load(mixed + last).to(tl.float32)
        left += u * load_row(mixed + last + 1, tokens, 1, C)[:, None]
        kept = u * load_row(momentum + last + 1, tokens, 1, C)[:, None]
        s = s * tl.load(momentum + last).to(tl.float32) + t_mm(kept, x, P)
    return w + t_mm(left, x, P), s


@triton.jit
def read(
    q, x, u, d, w, s, a, decay, mixed, line, tokens,
    C: tl.constexpr, MOVES: tl.constexpr, ANCHOR: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The reads of q; `line` is where their first row of the tables begins: 0 before a token's write, else a side."""
    side = tokens + 1
    scores = mm_t(q, x, P)
    a0 = load_row(decay + line, tokens, side, C)[:, None]
    y = mm_t(q, w, P) * a0
    if ANCHOR:
        y += mm_t(q, a, P) * (1 - a0)
    if MOVES:
        k0 = load_row(mixed + line, tokens, side, C)[:, None]
        y += mm_t(q, s, P) * k0
        y += mm(scores * load_tile(mixed + line + 1, tokens, tokens, side, C, C), u, P)
    return y + mm(scores * load_tile(decay + line + 1, tokens, tokens, side, C, C), d, P)


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
    w = load_tile(weight + cells, outs, ins, ins, O, I)
    s, a, d = w, w, u
    if MOVES:
        s = load_tile(velocity + cells, outs, ins, ins, O, I)
    if ANCHOR:
        a = load_tile(anchor + cells, outs, ins, ins, O, I)
    if ERASE:
        made = load_tile(products + rows, tokens, outs, outs, C, O)
        rate = load_row(erase + n * tokens, tokens, 1, C)
        d, inverse = solve(x, u, made, rate, s, a, decay, mixed, tokens, C, LEVELS, MOVES, ANCHOR, P)
        store_tile(inverse_out + n * tokens * tokens, inverse, tokens, tokens, tokens, C, C)
        store_tile(d_out + rows, d, tokens, outs, outs, C, O)
    new, moved = end_of_chunk(x, u, d, w, s, a, decay, mixed, momentum, tokens, C, MOVES, ANCHOR, P)
    store_tile(new_weight + cells, new, outs, ins, ins, O, I)
    if MOVES:
        store_tile(new_velocity + cells, moved, outs, ins, ins, O, I)

    if READ:  # noqa: SIM102 (the compiler decides this one, the program the next)
        if n >= first_read:
            line = 0
            if AFTER:
                line = side
            at = n - first_read
            q = load_tile(queries + at * size, tokens, ins, ins, C, I)
            if ACTIVE:
                q = q * sigmoid(q)
            y = read(q, x, u, d, w, s, a, decay, mixed, line, tokens, C, MOVES, ANCHOR, P)
            if ACTIVE:
                y += load_tile(residual + at * tokens * outs, tokens, outs, outs, C, O)
            store_tile(reads + at * tokens * outs, y, tokens, outs, outs, C, O)
