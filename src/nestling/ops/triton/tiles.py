"""Pieces of the kernels: tiles of rows of tokens, padded to powers of two by zeros, and the triangular inverse."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(at, rows, cols, stride, R: tl.constexpr, K: tl.constexpr):
    """Rows 0..rows of `cols` numbers as a float32 [R, K], zero outside."""
    r, c = tl.arange(0, R)[:, None], tl.arange(0, K)[None, :]
    return tl.load(at + r * stride + c, mask=(r < rows) & (c < cols), other=0.0).to(tl.float32)


@triton.jit
def store_tile(at, tile, rows, cols, stride, R: tl.constexpr, K: tl.constexpr):
    r, c = tl.arange(0, R)[:, None], tl.arange(0, K)[None, :]
    tl.store(at + r * stride + c, tile.to(at.dtype.element_ty), mask=(r < rows) & (c < cols))


@triton.jit
def load_row(at, count, stride, R: tl.constexpr):
    """`count` numbers, `stride` apart, as a float32 [R], zero outside."""
    r = tl.arange(0, R)
    return tl.load(at + r * stride, mask=r < count, other=0.0).to(tl.float32)


@triton.jit
def store_row(at, row, count, stride, R: tl.constexpr):
    r = tl.arange(0, R)
    tl.store(at + r * stride, row.to(at.dtype.element_ty), mask=r < count)


@triton.jit
def add_tile(at, tile, rows, cols, stride, R: tl.constexpr, K: tl.constexpr):
    store_tile(at, load_tile(at, rows, cols, stride, R, K) + tile, rows, cols, stride, R, K)


@triton.jit
def add_row(at, row, count, stride, R: tl.constexpr):
    store_row(at, load_row(at, count, stride, R) + row, count, stride, R)


@triton.jit
def mm(x, y, PRECISION: tl.constexpr):
    """x y."""
    return tl.dot(x, y, input_precision=PRECISION)


@triton.jit
def mm_t(x, y, PRECISION: tl.constexpr):
    """x y^T."""
    return tl.dot(x, tl.trans(y), input_precision=PRECISION)


@triton.jit
def t_mm(x, y, PRECISION: tl.constexpr):
    """x^T y."""
    return tl.dot(tl.trans(x), y, input_precision=PRECISION)


@triton.jit
def unit_inverse(lower, C: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """(I + lower)^-1 of a strictly lower triangular [C, C], C = 2^LEVELS, by blocks of doubling size.

    With X the inverse of the blocks on the diagonal and B what joins two of them, the pair's inverse is X - X B X. The
    product (I - L)(I + L^2)(I + L^4)... costs as much, but its terms reach binomial(C, C / 2) where keys are alike.
    """
    t = tl.arange(0, C)
    r, c = t[:, None], t[None, :]
    inverse = tl.where(r == c, 1.0, 0.0) - tl.where((r >> 1) == (c >> 1), lower, 0.0)
    for level in range(1, LEVELS):
        joins = ((r >> (level + 1)) == (c >> (level + 1))) & ((r >> level) != (c >> level))
        inverse -= mm(mm(inverse, tl.where(joins, lower, 0.0), PRECISION), inverse, PRECISION)
    return inverse


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))
