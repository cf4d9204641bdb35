"""Launches the kernels: sizes, padding, precision, and placeholders for what is missing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from nestling.ops.triton import inner, inner_linear, rule, rule_backward, table, whole

WARPS: int | None = None  # for every kernel, in place of `warps`


def padded(size: int) -> int:
    """The side of a tile that holds `size`: a power of two from 16, the least that a matrix product takes."""
    return max(16, triton.next_power_of_2(size))


def warps(tokens: int, outs: int, ins: int) -> int:
    """Warps of a program: 8 where tiles are 64 x 64, for 4 would keep 32 numbers of each tile in every thread.

    Narrow layers take 4: with 8, Triton 3.6 lays two groups of warps over rows that only one needs.
    """
    *_, second, first = sorted((tokens, outs, ins, tokens))
    return WARPS or (8 if first * second >= 64 * 64 and min(outs, ins) >= 64 else 4)


def precision() -> str:
    """Of float32 products: torch's own setting, as for its matrix products."""
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def forward_rule(
    c: Sequence[Tensor | None],
    outputs: Sequence[Tensor | None],
    after: bool,
    groups: int,
    residual: Tensor | None = None,
) -> None:
    """`rule.chunk_forward` for a `Chunk`: outputs weight, velocity, reads, d, inverse; see there for the rest."""
    weight, velocity, _, keys, writes, erase, _, _, _, queries, anchor = c
    total, tokens, outs = writes.shape
    ins, side = keys.shape[-1], padded(tokens)
    tiles = side, padded(outs), padded(ins)
    rule.chunk_forward[(total,)](
        *_given(c, weight), weight if residual is None else residual, *_given(outputs, weight),
        tokens, outs, ins, keys.shape[0], groups, total - (0 if queries is None else queries.shape[0]),
        C=tiles[0], O=tiles[1], I=tiles[2], LEVELS=side.bit_length() - 1, MOVES=velocity is not None,
        ANCHOR=anchor is not None, ERASE=erase is not None, READ=queries is not None, AFTER=after,
        ACTIVE=residual is not None, P=precision(), num_warps=warps(*tiles), num_stages=1,
    )  # fmt: skip


def backward_rule(
    c: Sequence[Tensor | None], saved: Sequence[Tensor], grads: Sequence[Tensor | None], found: Sequence[Tensor | None],
    after: bool, groups: int, *, table_stride: int, active: bool = False, add: bool = False,
    extra: Tensor | None = None,
) -> None:  # fmt: skip
    """`rule_backward.chunk_backward` for a `Chunk`: saved d and inverse, grads of weight, velocity and reads."""
    weight, velocity, _, keys, writes, erase, _, _, _, queries, anchor = c
    total, tokens, outs = writes.shape
    ins = keys.shape[-1]
    tiles = padded(tokens), padded(outs), padded(ins)
    rule_backward.chunk_backward[(total,)](
        *_given(c, weight), *saved, weight if extra is None else extra, *_given(grads, weight), *_given(found, weight),
        tokens, outs, ins, keys.shape[0], groups, total - (0 if queries is None else queries.shape[0]), table_stride,
        C=tiles[0], O=tiles[1], I=tiles[2], MOVES=velocity is not None, ANCHOR=anchor is not None,
        ERASE=erase is not None, READ=grads[2] is not None, AFTER=after, ACTIVE=active, EXTRA=extra is not None,
        ADD=add, P=precision(), num_warps=warps(*tiles), num_stages=1,
    )  # fmt: skip


def forward_inner(step: Sequence[Tensor | None], outputs: Sequence[Tensor], rate: Tensor) -> None:
    """`inner.inner_forward` for an `MLPStep`; outputs are the kernel's, up to writes1."""
    w2, w1, _, _, keys, values, _, eta, mu, *_ = step
    sizes, options = _inner(w2, keys, mu)
    inner.inner_forward[(w2.shape[0],)](
        w2, w1, keys, values, eta, eta if mu is None else mu, *outputs, rate, *sizes, **options
    )  # fmt: skip


def backward_inner(step: Sequence[Tensor | None], saved: Sequence[Tensor], grads, found, stride: int) -> None:
    """`inner.inner_backward` for an `MLPStep`: saved, grads and found are the kernel's, in its order."""
    w2, w1, _, _, keys, values, _, eta, mu, *_ = step
    sizes, options = _inner(w2, keys, mu)
    inner.inner_backward[(w2.shape[0],)](
        w2, w1, keys, values, eta, eta if mu is None else mu, *saved, *grads, *found, *sizes, stride, **options
    )  # fmt: skip


def forward_whole(step: Sequence[Tensor | None], outputs: Sequence[Tensor | None], after: bool) -> None:
    """`whole.step_forward` for an `MLPStep`; outputs are the kernel's, in its order."""
    w2, queries = step[0], step[6]
    sizes, options = _whole(step, after)
    side = options["C"]
    whole.step_forward[(w2.shape[0],)](
        *_given(step, w2), *_given(outputs, w2), *sizes, **options, LEVELS=side.bit_length() - 1,
        READ=queries is not None,
    )  # fmt: skip


def backward_whole(step: Sequence[Tensor | None], saved, grads, found, after: bool, stride: int) -> None:
    """`whole.step_backward` for an `MLPStep`: saved, grads and found are the kernel's, in its order."""
    w2 = step[0]
    sizes, options = _whole(step, after)
    whole.step_backward[(w2.shape[0],)](
        *_given(step, w2), *saved, *_given(grads, w2), *_given(found, w2), *sizes, stride, **options,
        READ=grads[4] is not None,
    )  # fmt: skip


def _whole(step: Sequence[Tensor | None], after: bool):
    w2, _, s2, _, keys, _, queries, *_, anchor, _ = step
    (tokens, inside, width, groups, _), options = _inner(w2, keys, s2)
    first = w2.shape[0] - (0 if queries is None else queries.shape[0])
    return (tokens, inside, width, groups, first), options | dict(ANCHOR=anchor is not None, AFTER=after)


def forward_linear(step: Sequence[Tensor | None], outputs: Sequence[Tensor], rate: Tensor) -> None:
    """`inner_linear.linear_forward` for a `LinearStep`; outputs are the kernel's, up to writes."""
    weight, _, keys, values, _, eta, mu, *_ = step
    sizes, options = _linear(weight, keys, mu)
    given = weight, keys, values, eta, eta if mu is None else mu
    inner_linear.linear_forward[(weight.shape[0],)](*given, *outputs, rate, *sizes, **options)


def backward_linear(step: Sequence[Tensor | None], saved: Sequence[Tensor], grads, found, stride: int) -> None:
    """`inner_linear.linear_backward` for a `LinearStep`: saved, grads and found are the kernel's, in its order."""
    weight, _, keys, values, _, eta, mu, *_ = step
    sizes, options = _linear(weight, keys, mu)
    given = weight, keys, values, eta, eta if mu is None else mu
    inner_linear.linear_backward[(weight.shape[0],)](*given, *saved, *grads, *found, *sizes, stride, **options)


def _linear(weight: Tensor, keys: Tensor, mu: Tensor | None):
    groups, tokens, ins = keys.shape
    tiles = padded(tokens), padded(weight.shape[1]), padded(ins)
    options = dict(
        C=tiles[0], O=tiles[1], I=tiles[2], MOVES=mu is not None, P=precision(), num_warps=warps(*tiles), num_stages=1
    )  # fmt: skip
    return (tokens, weight.shape[1], ins, groups), options


def forward_table(decay: Tensor, momentum: Tensor | None, tables: Sequence[Tensor | None]) -> None:
    """`table.table_forward` for decay and momentum [G, C]; tables are A, K, M."""
    groups, tokens = decay.shape
    table.table_forward[(groups,)](
        *_given((decay, momentum, *tables), decay), tokens, **_table(tokens, momentum is not None)
    )  # fmt: skip


def backward_table(
    tables: Sequence[Tensor | None], grads: Sequence[Tensor | None], found: Sequence[Tensor | None]
) -> None:
    """`table.table_backward`: tables A and M, grads of A, K and M, found for decay and momentum."""
    decay = tables[0]
    tokens = decay.shape[-1] - 1
    given = _given((*tables, *grads, *found), decay)
    table.table_backward[(decay.shape[0],)](*given, tokens, **_table(tokens, tables[1] is not None))


def _table(tokens: int, moves: bool) -> dict:
    side = padded(tokens)
    return dict(C=side, MOVES=moves, P=precision(), num_warps=warps(side, side, side), num_stages=1)


def _inner(w2: Tensor, keys: Tensor, mu: Tensor | None):
    total, width, inside = w2.shape
    groups, tokens, _ = keys.shape
    tiles = padded(tokens), padded(inside), padded(width)
    options = dict(
        C=tiles[0], I=tiles[1], H=tiles[2], MOVES=mu is not None, P=precision(), num_warps=warps(*tiles),
        num_stages=1,
    )  # fmt: skip
    return (tokens, inside, width, groups, total * tokens), options


def _given(tensors: Sequence[Tensor | None], instead: Tensor) -> list[Tensor]:
    """The kernels' flags say what is missing; its pointer is never followed."""
    return [instead if t is None else t for t in tensors]
