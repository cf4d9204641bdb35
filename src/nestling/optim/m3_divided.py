"""M3's step of parameters that several ranks hold: each matrix is orthogonalised once (`optim.division`).

What is done element by element each rank does on its part. The mean of V and the root mean square of a step are taken
over whole matrices: two small all-reduces for all parameters together.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from nestling.ops.orthogonalize import multiply_adds
from nestling.optim.division import Request, orthogonalized, stretch
from nestling.optim.multiscale import RMS, TINY, M3Settings, State, descend, direct, remember
from nestling.optim.sharding import local

Work = tuple[list[Tensor], list[Tensor], list[State], M3Settings, int]  # as m3_batched takes it


@torch.compiler.disable
def divided_step(work: Sequence[Work], group: dist.ProcessGroup, sharded: bool) -> None:
    """The step of `multiscale`, for parameters sharded along their first dimension, or whole on every rank (DDP)."""
    requests, parts = [], []
    for parameters, gradients, states, settings, step in work:
        part = Part(parameters, states, settings, step, group)
        opens = [(step - 1) % period == 0 for period in settings.periods]
        asked = [remember([local(g) for g in gradients], part.states, settings, opens)]
        asked += [torch.stack([state[f"m{scale + 1}"] for state in part.states]) for scale in part.due]
        requests += [_request(x, parameters[0].shape, settings) for x in asked]
        parts.append(part)
    directions = iter(orthogonalized(requests, group, sharded))
    slow = []
    for part in parts:
        part.update = next(directions)
        slow += [(part, scale, next(directions)) for scale in part.due]
    if sharded:
        _descend(parts, group)
    else:
        for part in parts:
            descend(part.weights, part.update, part.states, part.settings, part.decay)
    for part, scale, direction in slow:
        for state, value in zip(part.states, direction.unbind()):
            state[f"o{scale + 1}"].copy_(value)


class Part:
    """This rank's part of some parameters of one shape, in their step."""

    def __init__(self, parameters: list[Tensor], states: list[State], settings: M3Settings, step: int, group) -> None:
        self.settings = settings
        self.weights = [local(p) for p in parameters]
        self.states = [{name: local(value) for name, value in state.items()} for state in states]
        self.due = [scale for scale in settings.slow() if step % settings.periods[scale] == 0]
        self.decay = torch.tensor(settings.beta_v**step, dtype=torch.float64)
        self.update = torch.empty(0)
        batch, rows, columns = settings.shape
        shape = parameters[0].shape
        self.by_rows = batch == 1 and rows == shape[0]  # a rank has some rows of each matrix, else some whole matrices
        start, stop = stretch(shape, dist.get_rank(group), dist.get_world_size(group))
        self.first, self.last = start // columns, stop // columns
        self.sizes = [  # elements of each whole piece
            size * columns if settings.dim == -2 else rows * size for size in settings.sizes
        ] or [rows * columns]

    def pieces(self, stacked: Tensor) -> Sequence[Tensor]:
        """[P, *part] -> what this rank has of the pieces that are orthogonalised apart: views."""
        settings = self.settings
        if not self.by_rows:
            return settings.pieces(stacked)
        x = stacked.flatten(2)
        if not settings.sizes or settings.dim == -1:
            return x.split(settings.sizes, -1) if settings.sizes else (x,)
        edges = [min(max(edge, self.first), self.last) - self.first for edge in accumulate(settings.sizes, initial=0)]
        return [x[:, a:b] for a, b in zip(edges, edges[1:])]


def _request(stacked: Tensor, shape: torch.Size, settings: M3Settings) -> Request:
    _, m, n = settings.shape
    pieces = [(size, n) if settings.dim == -2 else (m, size) for size in settings.sizes] or [(m, n)]
    dtype = settings.ns_dtype or stacked.dtype
    cost = sum(multiply_adds(settings.ns_steps, *s, coefficients=settings.coefficients, dtype=dtype) for s in pieces)
    return Request(stacked, shape, settings.shape, settings.orthogonal, cost)


def _descend(parts: list[Part], group: dist.ProcessGroup) -> None:
    """`multiscale.descend` for all parts at once, with its two means over whole matrices."""
    for part in parts:
        direct(part.update, part.states, part.settings)
    roots = [torch.stack([s["v"] for s in part.states]) if "v" in part.states[0] else None for part in parts]
    found = _means(
        [None if v is None or not p.settings.ema else p.pieces(v) for p, v in zip(parts, roots)], parts, group
    )
    for part, root, means in zip(parts, roots, found):
        if root is None:
            continue
        for x, mean in zip(part.pieces(root), means or [None] * len(part.sizes)):
            if mean is None:
                x.sqrt_().add_(part.settings.eps + TINY)
            else:
                mean = mean / (1 - part.decay)
                x.add_(part.decay * mean).sqrt_().add_(part.settings.eps * mean.sqrt() + TINY)
        part.update.div_(root)
    squares = [[x.square() for x in p.pieces(p.update)] if p.settings.rms_match else None for p in parts]
    for part, means in zip(parts, _means(squares, parts, group)):
        lr = part.settings.lr
        for x, mean in zip(part.pieces(part.update), means or [None] * len(part.sizes)):
            x.mul_(lr if mean is None else lr * RMS / mean.sqrt().clamp(min=TINY))
        if part.settings.weight_decay:
            torch._foreach_mul_(part.weights, 1 - lr * part.settings.weight_decay)
        torch._foreach_sub_(part.weights, list(part.update.unbind()))


def _means(
    pieces: Sequence[Sequence[Tensor] | None], parts: list[Part], group: dist.ProcessGroup
) -> list[list[Tensor] | None]:
    """The mean of each whole piece, [P, 1, 1], of which ranks hold some rows or all (collective)."""
    means: list[list[Tensor] | None] = []
    spread: dict[tuple, list[Tensor]] = {}
    for own, part in zip(pieces, parts):
        means.append(None if own is None else [x.sum((-2, -1), keepdim=True) / s for x, s in zip(own, part.sizes)])
        if part.by_rows:
            for mean in means[-1] or ():
                spread.setdefault((mean.dtype, mean.device), []).append(mean)
    for some in spread.values():
        flat = torch.cat([mean.flatten() for mean in some])
        dist.all_reduce(flat, group=group)
        for mean, value in zip(some, flat.split([mean.numel() for mean in some])):
            mean.copy_(value.view_as(mean))
    return means
