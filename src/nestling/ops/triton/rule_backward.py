"""The gradient of `rule.chunk_forward`, one memory per program: the equations of `ops.chunk.chunk_backward`."""

from __future__ import annotations

import triton
import triton.language as tl

from nestling.ops.triton.tiles import (
    add_row,
    add_tile,
    load_row,
    load_tile,
    mm,
    mm_t,
    sigmoid,
    store_row,
    store_tile,
    t_mm,
)


@triton.jit
def _begin_table(at, tile, column, tokens, side, uncovered, line, C: tl.constexpr, ADD: tl.constexpr):
    """What the reads give to a table, from the row at `line`; zero in the row that no read sees, at `uncovered`."""
    if ADD:
        add_tile(at + line + 1, tile, tokens, tokens, side, C, C)
        add_row(at + line, column, tokens, side, C)
    else:
        store_tile(at + line + 1, tile, tokens, tokens, side, C, C)
        store_row(at + line, column, tokens, side, C)
        store_row(at + uncovered + 1, column * 0.0, tokens, 1, C)
        tl.store(at + uncovered, 0.0)


@triton.jit
def _add_last(at, first, row, tokens, C: tl.constexpr):
    """Add to a table's last row, which `at` points to."""
    tl.store(at, tl.load(at) + first)
    add_row(at + 1, row, tokens, 1, C)


@triton.jit
def gradient(
    x, u, d, products, rate, g_w, g_s, weight, velocity, anchor, inverse, decay, mixed, momentum, queries, extra,
    g_reads, g_weight, g_decay, g_mixed, g_momentum, g_queries, is_read, tokens, outs, ins,
    C: tl.constexpr, O: tl.constexpr, I: tl.constexpr, MOVES: tl.constexpr, ANCHOR: tl.constexpr, ERASE: tl.constexpr,
    READ: tl.constexpr, AFTER: tl.constexpr, ACTIVE: tl.constexpr, EXTRA: tl.constexpr, ADD: tl.constexpr,
    HELD: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Gradients of velocity, anchor, products, keys, writes and rates of erase, as tiles; of the rest, stored.

    x to g_s are tiles, g_w and g_s the gradients of the state after the chunk, products too where HELD; the others are
    pointers, at what is this memory's, and loaded where they are used: there is no room for all. Those of tables are
    added to what is there where ADD. EXTRA: `extra` is added to the gradient of the queries.
    """
    side = tokens + 1
    last = tokens * side

    # the state after the chunk
    ac = tl.load(decay + last).to(tl.float32)
    acj = load_row(decay + last + 1, tokens, 1, C)[:, None]
    xw = mm_t(x, g_w, P)
    g_first = tl.sum(tl.sum(g_w * load_tile(weight, outs, ins, ins, O, I), 1), 0)
    g_last = tl.sum(xw * d, 1)
    gw = g_w * ac
    ga, gs, g_u = gw, gw, u
    left = d * acj
    g_d = xw * acj
    if ANCHOR:
        g_first -= tl.sum(tl.sum(g_w * load_tile(anchor, outs, ins, ins, O, I), 1), 0)
        ga = g_w * (1 - ac)
    if MOVES:
        s = load_tile(velocity, outs, ins, ins, O, I)
        kcj = load_row(mixed + last + 1, tokens, 1, C)[:, None]
        mcj = load_row(momentum + last + 1, tokens, 1, C)[:, None]
        xs = mm_t(x, g_s, P)
        k_first, k_last = tl.sum(tl.sum(g_w * s, 1), 0), tl.sum(xw * u, 1)
        m_first, m_last = tl.sum(tl.sum(g_s * s, 1), 0), tl.sum(xs * u, 1)
        gs = g_s * tl.load(momentum + last).to(tl.float32) + g_w * tl.load(mixed + last).to(tl.float32)
        left += u * kcj
        g_u = xs * mcj + xw * kcj
    g_x = mm(left, g_w, P)
    if MOVES:
        g_x += mm(u * mcj, g_s, P)

    # the reads, of the last memories; the others begin their tables with zeros
    line, uncovered = 0, last
    if AFTER:
        line, uncovered = side, 0
    seen_a = tl.zeros([C, C], tl.float32)
    seen_k = seen_a
    first_a = tl.zeros([C], tl.float32)
    first_k = first_a
    if READ:  # noqa: SIM102 (the compiler decides this one, the program the next)
        if is_read:
            g_r = load_tile(g_reads, tokens, outs, outs, C, O)
            q = load_tile(queries, tokens, ins, ins, C, I)
            if ACTIVE:
                q = q * sigmoid(q)
            scores = mm_t(q, x, P)
            a0 = load_row(decay + line, tokens, side, C)[:, None]
            seen = load_tile(decay + line + 1, tokens, tokens, side, C, C)
            pull = mm(g_r, load_tile(weight, outs, ins, ins, O, I), P)
            first_a = tl.sum(pull * q, 1)
            g_q = pull * a0
            gw += t_mm(g_r * a0, q, P)
            g_d += t_mm(scores * seen, g_r, P)
            if ANCHOR:
                pull = mm(g_r, load_tile(anchor, outs, ins, ins, O, I), P)
                first_a -= tl.sum(pull * q, 1)
                g_q += pull * (1 - a0)
                ga += t_mm(g_r * (1 - a0), q, P)
            rd = mm_t(g_r, d, P)
            seen_a = scores * rd
            g_scores = rd * seen
            if MOVES:
                k0 = load_row(mixed + line, tokens, side, C)[:, None]
                seen = load_tile(mixed + line + 1, tokens, tokens, side, C, C)
                pull = mm(g_r, s, P)
                first_k = tl.sum(pull * q, 1)
                g_q += pull * k0
                gs += t_mm(g_r * k0, q, P)
                g_u += t_mm(scores * seen, g_r, P)
                rd = mm_t(g_r, u, P)
                seen_k = scores * rd
                g_scores += rd * seen
            g_q += mm(g_scores, x, P)
            g_x += t_mm(g_scores, q, P)
            if ACTIVE:
                pre = load_tile(queries, tokens, ins, ins, C, I)
                bent = sigmoid(pre)
                g_q *= bent + bent * (pre - pre * bent)
            if EXTRA:
                g_q += load_tile(extra, tokens, ins, ins, C, I)
            store_tile(g_queries, g_q, tokens, ins, ins, C, I)
    store_tile(g_weight, gw, outs, ins, ins, O, I)
    _begin_table(g_decay, seen_a, first_a, tokens, side, uncovered, line, C, ADD)
    if MOVES:
        _begin_table(g_mixed, seen_k, first_k, tokens, side, uncovered, line, C, ADD)
        if not ADD:
            _begin_table(g_momentum, seen_k * 0.0, first_k * 0.0, tokens, side, uncovered, line, C, ADD)
    tl.debug_barrier()  # what follows adds to what other threads have written
    _add_last(g_decay + last, g_first, g_last, tokens, C)
    if MOVES:
        _add_last(g_mixed + last, k_first, k_last, tokens, C)
        _add_last(g_momentum + last, m_first, m_last, tokens, C)

    y, g_e, g_products = g_d, rate, u
    if ERASE:
        # the triangular system (I + beta (gram . A)) d = u - beta base, whose right side has the gradient y
        beta = rate[:, None]
        gram = mm_t(x, x, P)
        seen = load_tile(decay + 1, tokens, tokens, side, C, C)
        a0 = load_row(decay, tokens, side, C)
        y = t_mm(load_tile(inverse, tokens, tokens, tokens, C, C), g_d, P)
        made = products
        if not HELD:
            made = load_tile(products, tokens, outs, outs, C, O)
        yp = tl.sum(y * made, 1)
        g_e = a0 * yp
        first_a = -rate * yp
        g_products = y * -(rate * a0)[:, None]
        if ANCHOR:
            pull = mm(y, load_tile(anchor, outs, ins, ins, O, I), P)
            yp = tl.sum(pull * x, 1)
            g_e += (1 - a0) * yp
            first_a += rate * yp
            back = (rate * (1 - a0))[:, None]
            g_x -= pull * back
            ga -= t_mm(y * back, x, P)
        yd = mm_t(y, d, P)
        add_row(g_decay, first_a, tokens, side, C)
        add_tile(g_decay + 1, gram * beta * yd * -1.0, tokens, tokens, side, C, C)
        g_gram = yd * seen
        if MOVES:
            k0 = load_row(mixed, tokens, side, C)
            seen = load_tile(mixed + 1, tokens, tokens, side, C, C)
            pull = mm(y, load_tile(velocity, outs, ins, ins, O, I), P)
            yp = tl.sum(pull * x, 1)
            g_e += k0 * yp
            add_row(g_mixed, -rate * yp, tokens, side, C)
            back = (rate * k0)[:, None]
            g_x -= pull * back
            gs -= t_mm(y * back, x, P)
            yu = mm_t(y, u, P)
            add_tile(g_mixed + 1, gram * beta * yu * -1.0, tokens, tokens, side, C, C)
            g_gram += yu * seen
            g_u += y - t_mm(gram * seen * beta, y, P)
        g_e = -(g_e + tl.sum(g_gram * gram, 1))
        g_gram = g_gram * -beta
        g_x += mm(g_gram + tl.trans(g_gram), x, P)
    elif MOVES:
        g_u += y
    if MOVES:
        y = g_u
    return gs, ga, g_products, g_x, y, g_e


@triton.jit
def chunk_backward(
    weight, velocity, products, keys, writes, erase, decay, mixed, momentum, queries, anchor, d_in, inverse_in, extra,
    g_new_weight, g_new_velocity, g_reads,
    g_weight, g_velocity, g_products, g_keys, g_writes, g_erase, g_decay, g_mixed, g_momentum, g_queries, g_anchor,
    tokens, outs, ins, key_groups, groups, first_read, table_stride,
    C: tl.constexpr, O: tl.constexpr, I: tl.constexpr, MOVES: tl.constexpr, ANCHOR: tl.constexpr, ERASE: tl.constexpr,
    READ: tl.constexpr, AFTER: tl.constexpr, ACTIVE: tl.constexpr, EXTRA: tl.constexpr, ADD: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """Arguments as in `chunk_forward` and `gradient`. Gradients of tables lie `table_stride` apart."""
    n = tl.program_id(0).to(tl.int64)
    side = tokens + 1
    table, share = (n % groups) * side * side, n * table_stride
    rows, cells, size, line = n * tokens * outs, n * outs * ins, tokens * ins, n * tokens
    asked, given = (n - first_read) * size, (n - first_read) * tokens * outs
    x = load_tile(keys + (n % key_groups) * size, tokens, ins, ins, C, I)
    u = load_tile(writes + rows, tokens, outs, outs, C, O)
    g_w = load_tile(g_new_weight + cells, outs, ins, ins, O, I)
    g_s, d, rate = g_w, u, tl.zeros([C], tl.float32)
    if ERASE:
        d = load_tile(d_in + rows, tokens, outs, outs, C, O)
        rate = load_row(erase + line, tokens, 1, C)
    if MOVES:
        g_s = load_tile(g_new_velocity + cells, outs, ins, ins, O, I)
    gs, ga, g_made, g_x, g_u, g_e = gradient(
        x, u, d, products + rows, rate, g_w, g_s, weight + cells, velocity + cells, anchor + cells,
        inverse_in + line * tokens, decay + table, mixed + table, momentum + table, queries + asked, extra + asked,
        g_reads + given, g_weight + cells, g_decay + share, g_mixed + share, g_momentum + share, g_queries + asked,
        n >= first_read, tokens, outs, ins,
        C, O, I, MOVES, ANCHOR, ERASE, READ, AFTER, ACTIVE, EXTRA, ADD, False, P,
    )  # fmt: skip
    if ERASE:
        store_tile(g_products + rows, g_made, tokens, outs, outs, C, O)
        store_row(g_erase + line, g_e, tokens, 1, C)
    if MOVES:
        store_tile(g_velocity + cells, gs, outs, ins, ins, O, I)
    if ANCHOR:
        store_tile(g_anchor + cells, ga, outs, ins, ins, O, I)
    store_tile(g_writes + rows, g_u, tokens, outs, outs, C, O)
    store_tile(g_keys + n * size, g_x, tokens, ins, ins, C, I)
