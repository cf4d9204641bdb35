"""Delta Momentum: momentum whose decay depends on the gradient (NL Eq. 49)."""

from __future__ import annotations

from nestling.optim.base import MemoryOptimizer
from nestling.optim.checks import check_choice
from nestling.optim.memories import L2, DotProduct, GradientMemory
from nestling.optim.preconditioners import Preconditioner

FORMS = ("unit", "raw", "literal")


class DeltaMomentum(MemoryOptimizer):
    """Momentum that forgets along the gradient's direction before it writes (NL Eq. 49): an L2 memory of gradients.

        m <- m (momentum I - e k^T k) - (e / erase) g / |k|,   e = erase / (1 + erase |k|^2),   W <- W + lr m

    with the rows of the gradient [o, n] as keys. `form` says which keys:

    - "unit": k = g / |g|, written with |g|. The step scales with the gradient as momentum's does, so a learning rate
      does not depend on the loss's scale, and the eigenvalues of the decay lie in [momentum - e, momentum] for any
      gradient. For a vector, the memory's share along the gradient keeps momentum - e, all else keeps momentum.
    - "raw": k = g, decision D1 as it stands: small gradients leave momentum, large ones write g / (1 + erase |g|^2).
    - "literal": the equation as printed, m <- m (momentum I - erase g^T g) - g; it diverges where
      erase |g|^2 > 1 + momentum.

    Args:
        params, lr, weight_decay, nonfinite: as for `MemoryOptimizer`.
        momentum: alpha in [0, 1), the decay of what the gradient does not point to.
        erase: weight of the erasure, at least 0; 0 is `torch.optim.SGD` with momentum.
        form: "unit", "raw" or "literal".
        preconditioner: P in m <- ... - P g (`optim.preconditioners`), or None.
        nesterov: read the memory as after the same gradient once more.
    """

    def __init__(
        self,
        params,
        lr=1e-2,
        momentum: float = 0.95,
        *,
        erase: float = 0.05,
        form: str = "unit",
        preconditioner: Preconditioner | None = None,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        nonfinite: str = "skip",
    ):
        self._preconditioner = preconditioner
        defaults = dict(
            lr=lr, momentum=momentum, erase=erase, form=form, nesterov=nesterov, weight_decay=weight_decay
        )  # fmt: skip
        self._setup(params, defaults, nonfinite)

    def memory(self, group):
        check_choice("form", group["form"], FORMS)
        erase = group["erase"]
        return GradientMemory(
            decay=group["momentum"],
            preconditioner=self._preconditioner,
            objective=L2(erase, literal=group["form"] == "literal") if erase else DotProduct(),
            features="unit" if group["form"] == "unit" else "identity",
            nesterov=group["nesterov"],
        )
