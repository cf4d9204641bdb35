"""Orthogonalising many matrices over many ranks: each matrix once, whole, by the rank that owns it.

FSDP2 cuts a parameter along its first dimension, so what a rank holds is one contiguous stretch of the flattened
parameter, and a matrix of it is another. All layouts come down to intersections of stretches. Owners are drawn from the
largest matrix down, each to the rank with the least work so far, on every rank alike. Then

    every rank -> owners    its stretch of every matrix        one all-to-all
    owners                  orthogonalise what they own
    owners -> every rank    its stretch of every result        one all-to-all

N elements over W ranks cost each of them 2 (W - 1) / W^2 N elements sent, and about 1 / W of the multiplications. Where
every rank holds everything (DDP) the first is not needed, and the second brings all results to all.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Request:
    """Matrices of P parameters of one shape.

    Attributes:
        local: this rank's part of each, [P, *part].
        shape: of one whole parameter.
        matrices: (b, m, n), a parameter as a batch of matrices.
        orthogonal: of whole matrices [K, m, n].
        cost: of one matrix, in any unit that all requests share.
    """

    local: Tensor
    shape: torch.Size
    matrices: tuple[int, int, int]
    orthogonal: Callable[[Tensor], Tensor]
    cost: float


class Piece(NamedTuple):
    """Elements start .. stop of row `row` of the tensor of request `request`."""

    request: int
    row: int
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """Who owns what, for one rank. Lists of pieces are by the other rank: what goes to it, or comes from it.

    Attributes:
        owned: matrices this rank owns, of each request.
        held: pieces of this rank's parts, by owner.
        gathered: pieces of the matrices it owns, by the rank that holds them.
        returned: pieces of the matrices it owns, by the rank that gets them.
        received: pieces of this rank's parts, by owner.
        work: the cost that falls to each rank.
    """

    owned: list[int]
    held: list[list[Piece]]
    gathered: list[list[Piece]]
    returned: list[list[Piece]]
    received: list[list[Piece]]
    work: list[float]


def orthogonalized(requests: Sequence[Request], group: dist.ProcessGroup, sharded: bool = True) -> list[Tensor]:
    """This rank's part of every orthogonalised parameter, like each request's `local` (collective).

    Args:
        requests: the same on every rank, but for `local`.
        group: the ranks.
        sharded: whether each rank holds a part, cut along the first dimension, or everything.
    """
    results = [torch.empty_like(request.local) for request in requests]
    kinds: dict[tuple, list[int]] = {}
    for i, request in enumerate(requests):
        kinds.setdefault((request.local.dtype, request.local.device), []).append(i)
    for chosen in kinds.values():
        _divide([requests[i] for i in chosen], [results[i] for i in chosen], group, sharded)
    return results


def stretch(shape: torch.Size, rank: int, ranks: int) -> tuple[int, int]:
    """Where a rank's part of a flattened parameter begins and ends, cut as FSDP2 cuts."""
    rows = -(-shape[0] // ranks)
    row = shape[1:].numel()
    return min(rank * rows, shape[0]) * row, min((rank + 1) * rows, shape[0]) * row


def _divide(requests: list[Request], results: list[Tensor], group: dist.ProcessGroup, sharded: bool) -> None:
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    key = tuple((len(r.local), r.shape, r.matrices, r.cost) for r in requests)
    plan = make_plan(key, rank, ranks, sharded)
    mine = [r.local.flatten(1) for r in requests]
    stacks = [r.local.new_empty(n, r.matrices[1] * r.matrices[2]) for r, n in zip(requests, plan.owned)]
    _move(mine, plan.held, stacks, plan.gathered, group if sharded else None)
    for i, request in enumerate(requests):
        if plan.owned[i]:
            whole = stacks[i].view(-1, *request.matrices[1:])
            stacks[i] = request.orthogonal(whole).reshape(stacks[i].shape)
    _move(stacks, plan.returned, [x.flatten(1) for x in results], plan.received, group)


def _move(
    source: list[Tensor], out: list[list[Piece]], target: list[Tensor], into: list[list[Piece]], group: Any
) -> None:
    """Send the pieces of `source` and write what arrives into the pieces of `target`; without a group, to itself."""
    leaving = [source[i][row, start:stop] for pieces in out for i, row, start, stop in pieces]
    sent = torch.cat(leaving) if leaving else source[0].new_empty(0)
    received = sent
    if group is not None:
        sizes = [[sum(p.stop - p.start for p in pieces) for pieces in side] for side in (into, out)]
        received = sent.new_empty(sum(sizes[0]))
        dist.all_to_all_single(received, sent, *sizes, group=group)
    places = [target[i][row, start:stop] for pieces in into for i, row, start, stop in pieces]
    if places:
        torch._foreach_copy_(places, list(received.split([len(place) for place in places])))


@functools.lru_cache(maxsize=64)  # a slow period has a plan for its end
def make_plan(requests: tuple, rank: int, ranks: int, sharded: bool) -> Plan:
    """The plan of a rank, from (parameters, shape, matrices, cost) of every request."""
    units = [
        (cost, request, parameter, matrix)
        for request, (count, _, (batch, _, _), cost) in enumerate(requests)
        for parameter in range(count)
        for matrix in range(batch)
    ]
    owner, free = {}, [(0.0, r) for r in range(ranks)]
    for unit in sorted(units, key=lambda unit: (-unit[0], unit)):
        load, r = heapq.heappop(free)
        owner[unit] = r
        heapq.heappush(free, (load + unit[0], r))
    work = [load for load, _ in sorted(free, key=lambda entry: entry[1])]
    owned = [0] * len(requests)
    held, gathered, returned, received = ([[] for _ in range(ranks)] for _ in range(4))
    plan = Plan(owned, held, gathered, returned, received, work)
    parts = [[stretch(shape, r, ranks) for r in range(ranks)] for _, shape, _, _ in requests]
    for unit in units:
        _, request, parameter, matrix = unit
        _, shape, (_, m, n), _ = requests[request]
        start, owns = matrix * m * n, owner[unit] == rank
        for r in range(ranks) if owns else (rank,):
            low, high = parts[request][r] if sharded else (0, shape.numel())
            a, b = max(low, start), min(high, start + m * n)
            if a >= b:
                continue
            inside = Piece(request, owned[request], a - start, b - start)
            if r == rank:
                here = Piece(request, parameter, a - low, b - low)
                plan.received[owner[unit]].append(here)
                if sharded or owns:
                    plan.held[owner[unit]].append(here)
            if owns:
                plan.returned[r].append(inside)
                if sharded or r == rank:
                    plan.gathered[r].append(inside)
        owned[request] += owns
    return plan
