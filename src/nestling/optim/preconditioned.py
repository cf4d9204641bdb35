"""Preconditioned momentum: gradients are mapped before they are remembered (NL Eq. 47)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from nestling.optim.base import MemoryOptimizer
from nestling.optim.checks import check_choice, check_fraction
from nestling.optim.memories import GradientMemory
from nestling.optim.preconditioners import Diagonal, Map, Orthogonal, Outer, Preconditioner

KINDS = ("diagonal", "outer", "orthogonal")


class PreconditionedMomentum(MemoryOptimizer):
    """m <- momentum m - (1 - dampening) P g,  W <- W + lr m (NL Eq. 47).

    Args:
        params, lr, weight_decay, nonfinite: as for `MemoryOptimizer`.
        momentum: alpha in [0, 1).
        preconditioner: "diagonal" divides by the root of a running average of squares (with dampening=0,
            `torch.optim.RMSprop` with momentum, whose bias it corrects); "outer" does so with a matrix, on the smaller
            side of each gradient; "orthogonal" orthogonalises each gradient by Newton-Schulz; or an object of
            `optim.preconditioners`; or a function of a gradient [o, n].
        beta: decay of the running average, None for the preconditioner's own.
        dampening: in [0, 1); None is `momentum`, the average of P g, with which a learning rate of Adam fits.
        nesterov: read the memory as after the same gradient once more.
    """

    def __init__(
        self,
        params,
        lr=1e-3,
        momentum: float = 0.9,
        *,
        preconditioner: str | Preconditioner | Callable[[Tensor], Tensor] = "diagonal",
        beta: float | None = None,
        dampening: float | None = None,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        nonfinite: str = "skip",
    ):
        self._preconditioner = preconditioner
        defaults = dict(
            lr=lr, momentum=momentum, beta=beta, dampening=dampening, nesterov=nesterov, weight_decay=weight_decay
        )
        self._setup(params, defaults, nonfinite)

    def memory(self, group):
        momentum, dampening = group["momentum"], group["dampening"]
        if dampening is not None:
            check_fraction("dampening", dampening)
        return GradientMemory(
            decay=momentum,
            rate=1 - (momentum if dampening is None else dampening),
            preconditioner=_build(self._preconditioner, group["beta"]),
            nesterov=group["nesterov"],
        )


def _build(kind, beta: float | None) -> Preconditioner:
    if not isinstance(kind, str):
        return kind if hasattr(kind, "apply") else Map(kind)
    check_choice("preconditioner", kind, KINDS)
    if beta is not None:
        check_fraction("beta", beta)
    if kind == "orthogonal":
        return Orthogonal()
    build = Diagonal if kind == "diagonal" else Outer
    return build() if beta is None else build(beta)
