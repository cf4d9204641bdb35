"""Linear layers that can carry a difference of their own for every stream of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

JOIN = 32  # rows of x from which a second product costs more than a sum of two matrices


class Seen(NamedTuple):
    """What Delta Gradient Descent needs of a chunk: sums over its tokens.

    Attributes:
        products: of (D x) x^T, [B, o, i].  norms: of |x|^2, [B].
    """

    products: Tensor
    norms: Tensor


class FastLinear(nn.Linear):
    """`nn.Linear` plus, while `applied`, a difference per stream: y_b = (W + D_b) x_b. Parameters keep their names."""

    delta: Tensor | None = None  # [B, o, i], or [1, o, i] for all rows of a batch
    fixed: bool = False  # no gradient reaches W
    seen: Seen | None = None
    watched: bool = False  # whether `seen` is taken

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, i] -> [B, T, o]."""
        weight = self.weight.detach() if self.fixed else self.weight
        if self.delta is not None and self.delta.shape[0] not in (1, x.shape[0]):
            raise ValueError(f"{self.delta.shape[0]} streams were read, but the input has {x.shape[0]} rows")
        # squeeze(0), whose gradient is a view: that of [0] fills a matrix with zeros first
        if self._joins(x):
            return F.linear(x, weight + self.delta.squeeze(0), self.bias)
        y = F.linear(x, weight, self.bias)
        if self.delta is None:
            return y
        delta = self.delta.to(x.dtype)
        # one product for all rows is faster than a batch of products of one
        learned = F.linear(x, delta.squeeze(0)) if delta.shape[0] == 1 else x @ delta.transpose(-1, -2)
        if self.watched:
            a, b = learned.to(self.delta.dtype), x.to(self.delta.dtype)
            self.seen = Seen(a.transpose(-1, -2) @ b, b.square().sum((-1, -2)))
        return y + learned

    def _joins(self, x: Tensor) -> bool:
        """Whether W + D is made first: one product forward and one less backward, for a pass over the weights.

        Not in a smaller type, which would round D away.
        """
        return (
            self.delta is not None and self.delta.shape[0] == 1 and not self.watched
            and x.dtype == self.weight.dtype == self.delta.dtype and not torch.is_autocast_enabled(x.device.type)
            and x.shape[:-1].numel() >= JOIN
        )  # fmt: skip


def make_fast(module: nn.Linear) -> FastLinear:
    """Turn a linear layer into a fast one where it stands: weights, names and hooks stay."""
    if type(module) not in (nn.Linear, FastLinear):
        raise ValueError(f"only nn.Linear can become fast weights, not {type(module).__name__}")
    module.__class__ = FastLinear
    return module


@contextmanager
def applied(
    modules: Sequence[FastLinear], deltas: Sequence[Tensor | None], *, fixed: bool = False, watched: bool = False
) -> Iterator[None]:
    """Inside, the modules use these differences, [B, o, i] each or None.

    fixed: their shared weights get no gradient.  watched: they keep what they have `seen`.
    """
    for module, delta in zip(modules, deltas, strict=True):
        module.delta, module.fixed, module.watched, module.seen = delta, fixed, watched, None
    try:
        yield
    finally:
        for module in modules:
            module.delta, module.fixed, module.watched, module.seen = None, False, False, None


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter asks for a gradient: only what depends on fast weights is recorded."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
