"""The delta rule over many chunks at once: all but the way of the state from chunk to chunk is one batch.

For writes u that do not depend on the weights and no momentum, a chunk (see `ops.chunk`) is an affine map of its first
weights. With (I + L) d = u - beta A[.-1, 0] W_0 x, L[t, j] = beta_t A[t-1, j] x_t.x_j, and rows
    U = (I + L)^-1 u,     E = (I + L)^-1 (beta A[.-1, 0] x),     hence d = U - E W_0^T,
the state after the chunk and the reads are
    W_C = W_0 (A[C, 0] I - E^T X) + U^T X,     X_j = A[C, j] x_j,
    r   = (A[., 0] q - P E) W_0^T + P U,       P[t, j] = A[t, j] q_t.x_j.
So a sequence costs some products over all chunks and one small product a chunk, where `delta_chunk` launches dozens of
operations for each: what a GPU waits for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nestling.ops import compiled
from nestling.ops.chunk import Chunk, decay_table, delta_chunk, solve
from nestling.ops.states import bounded, chunk_states
from nestling.ops.triangular import unit_inverse


def delta_chunks(
    weight: Tensor,
    keys: Tensor,
    writes: Tensor,
    decay: Tensor,
    erase: Tensor | None,
    queries: Tensor,
    *,
    chunk_size: int,
    after: bool,
    limit: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`delta_chunk` again and again, without momentum: the weights after the last chunk, and all reads [N, T, o].

    Args:
        weight: W_0 [N, o, i].  keys, queries: x and q [N, T, i].  writes: u [N, T, o].  decay, erase: alpha and beta
            [N, T], erase None for none. T is a multiple of `chunk_size`.
        after: read W_t q_t, else W_{t-1} q_t.
        limit: bound on the weights' Frobenius norm at every chunk's end.
    """
    count, tokens, ins = keys.shape
    chunks, outs = tokens // chunk_size, writes.shape[-1]
    if compiled.is_available(weight, keys, writes, decay, erase, queries):
        return _by_chunk(weight, keys, writes, decay, erase, queries, chunk_size, after, limit)

    def cut(t: Tensor) -> Tensor:
        return t.reshape(count * chunks, chunk_size, *t.shape[2:])

    x, q, u, a = cut(keys), cut(queries), cut(writes), decay_table(cut(decay), None).decay
    tail = a[:, -1, 1:, None] * x
    keep, erased = a[:, -1, :1, None] * torch.eye(ins, dtype=x.dtype, device=x.device), None
    if erase is not None:
        beta = cut(erase).unsqueeze(-1)
        low, first = beta * (torch.bmm(x, x.mT) * a[:, :-1, 1:]), beta * a[:, :-1, :1] * x
        if x.is_cuda:
            inverse = unit_inverse(low)
            u, erased = torch.bmm(inverse, u), torch.bmm(inverse, first)
        else:
            u, erased = solve(low, torch.cat([u, first], -1)).split([outs, ins], -1)
        keep = torch.baddbmm(keep, erased.mT, tail, alpha=-1)
    add = torch.bmm(u.mT, tail)
    states = chunk_states(weight, keep.unflatten(0, (count, chunks)), add.unflatten(0, (count, chunks)), limit)
    rows = slice(1, None) if after else slice(None, -1)
    scores, seen = torch.bmm(q, x.mT) * a[:, rows, 1:], a[:, rows, :1] * q
    if erased is not None:
        seen = torch.baddbmm(seen, scores, erased, alpha=-1)
    starts = states[:-1].transpose(0, 1).reshape(count * chunks, outs, ins)
    reads = torch.baddbmm(torch.bmm(scores, u), seen, starts.mT)
    return states[-1], reads.view(count, tokens, outs)


def _by_chunk(
    weight: Tensor, keys: Tensor, writes: Tensor, decay: Tensor, erase: Tensor | None, queries: Tensor,
    chunk_size: int, after: bool, limit: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`delta_chunks` by the C++ form of a chunk, which a CPU takes in the time of a few operations."""

    def cut(t: Tensor) -> tuple[Tensor, ...]:
        return t.unflatten(1, (-1, chunk_size)).transpose(0, 1).contiguous().unbind(0)

    erases = [None] * (keys.shape[1] // chunk_size) if erase is None else cut(erase)
    tables = decay_table(decay.unflatten(1, (-1, chunk_size)).transpose(0, 1), None).decay.unbind(0)
    reads = []
    for x, u, beta, table, q in zip(cut(keys), cut(writes), erases, tables, cut(queries), strict=True):
        base = None if beta is None else torch.bmm(x, weight.mT)
        weight, _, read = delta_chunk(Chunk(weight, None, base, x, u, beta, table, None, None, q), after)
        weight = weight if limit is None else bounded(weight, limit)
        reads.append(read)
    return weight, torch.cat(reads, 1)
