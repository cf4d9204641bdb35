"""Linear layers that can carry a difference of their own for every stream of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn


class FastLinear(nn.Linear):
    """`nn.Linear` plus, while `applied`, a difference per stream: y_b = (W + D_b) x_b. Parameters keep their names."""

    delta: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, i] -> [B, T, o]."""
        y = super().forward(x)
        if self.delta is None:
            return y
        return y + x @ self.delta.to(x.dtype).transpose(-1, -2)


def make_fast(module: nn.Linear) -> FastLinear:
    """Turn a linear layer into a fast one where it stands: weights, names and hooks stay."""
    if type(module) not in (nn.Linear, FastLinear):
        raise ValueError(f"only nn.Linear can become fast weights, not {type(module).__name__}")
    module.__class__ = FastLinear
    return module


@contextmanager
def applied(modules: Sequence[FastLinear], deltas: Sequence[Tensor | None]) -> Iterator[None]:
    """Inside, the modules use these differences, [B, o, i] each or None."""
    for module, delta in zip(modules, deltas, strict=True):
        module.delta = delta
    try:
        yield
    finally:
        for module in modules:
            module.delta = None


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter asks for a gradient: only what depends on fast weights is recorded."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
