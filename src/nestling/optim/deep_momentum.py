"""Deep Momentum Gradient Descent: the momentum is an MLP (NL Eq. 50)."""

from __future__ import annotations

from nestling.optim.base import MemoryOptimizer
from nestling.optim.checks import check_number
from nestling.optim.deep_memory import MLP
from nestling.optim.memories import L2, DotProduct, GradientMemory
from nestling.optim.preconditioners import Preconditioner


class DeepMomentum(MemoryOptimizer):
    """W <- W + lr m(g), m an MLP whose weights follow momentum * m - grad of its own objective (NL Eq. 50).

        m(u) = B + W1 tanh(W2 u),    L = <m(u), P u> + erase/2 |m(u)|^2,    u = g, row by row

    B is the momentum of `torch.optim.SGD`, to which `hidden=0` comes down; W1 and W2 (2 * hidden * n numbers for a
    parameter [o, n]) add past gradients that resemble the present one. Keys are normalised, so that the step scales
    with the gradient (`optim.deep_memory.MLP` says how).

    Args:
        params, lr, weight_decay, nonfinite: as for `MemoryOptimizer`.
        momentum: alpha in [0, 1), the decay of all of m's weights.
        hidden: width of the MLP.
        memory_rate: size of a write into W1 and W2, beside one into B; at least 0.
        erase: 0 is the dot product; above it the objective is L2, a deep Delta Momentum.
        preconditioner: P (`optim.preconditioners`), or None.
        seed: of W2's initial values.
    """

    def __init__(
        self,
        params,
        lr=1e-2,
        momentum: float = 0.9,
        *,
        hidden: int = 16,
        memory_rate: float = 1.0,
        erase: float = 0.0,
        preconditioner: Preconditioner | None = None,
        seed: int = 0,
        weight_decay: float = 0.0,
        nonfinite: str = "skip",
    ):
        self._preconditioner = preconditioner
        defaults = dict(
            lr=lr, momentum=momentum, hidden=hidden, memory_rate=memory_rate, erase=erase, seed=seed,
            weight_decay=weight_decay,
        )  # fmt: skip
        self._setup(params, defaults, nonfinite)

    def memory(self, group):
        check_number("memory_rate", group["memory_rate"])
        return GradientMemory(
            decay=group["momentum"],
            preconditioner=self._preconditioner,
            objective=L2(group["erase"]) if group["erase"] else DotProduct(),
            architecture=MLP(group["hidden"], group["memory_rate"], group["seed"]),
        )
