"""A linear memory whose inner problem is solved, not stepped: what it holds is the minimiser over all it has seen.

NL's memories take one step of descent for what they are shown (Eq. 57), so a later key overwrites an earlier one that
is like it. Where keys are few and come from a model that stays as it is, the same objective can be solved: of the keys
their second moment is kept beside the products with the values, and both only add up.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor


@dataclass
class ExactMemory:
    """M = argmin sum_t |M k_t - v_t|^2 + ridge |M|^2 (NL Def. 1), over all that was written.

    Its state are sums in float64, so the order of what was written does not matter, two memories merge by adding, and
    what is erased was never there (up to rounding).

    Args:
        dim: D, the size of a key.  values: V, the size of a value.
        ridge: what keeps M small: so many keys' worth of "nothing is known".
        normalized: keys are centred and scaled by what was seen of them, so that their mean square length is 1 and
            `ridge` means the same for any model; values are centred.

    Attributes:
        count: of keys written.  key_sum [D], value_sum [V].  gram [D, D]: sum of k k^T.  cross [V, D]: of v k^T.
    """

    dim: int
    values: int = 0
    ridge: float = 1.0
    normalized: bool = True
    count: Tensor = field(init=False)
    key_sum: Tensor = field(init=False)
    value_sum: Tensor = field(init=False)
    gram: Tensor = field(init=False)
    cross: Tensor = field(init=False)
    _solved: tuple[Tensor, ...] | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        if self.dim < 1 or self.values < 0:
            raise ValueError(f"dim must be at least 1 and values not negative, not {self.dim} and {self.values}")
        if not self.ridge > 0:
            raise ValueError(f"ridge must be above 0, not {self.ridge}: without it few keys have many solutions")
        zeros = torch.zeros
        self.count, self.key_sum = zeros((), dtype=torch.float64), zeros(self.dim, dtype=torch.float64)
        self.gram = zeros(self.dim, self.dim, dtype=torch.float64)
        self.value_sum = zeros(self.values, dtype=torch.float64)
        self.cross = zeros(self.values, self.dim, dtype=torch.float64)

    def write(self, keys: Tensor, values: Tensor, times: float = 1.0) -> None:
        """Add pairs: keys [N, D], values [N, V]; each counts `times`.

        Raises:
            ValueError: other shapes, or a number that is not finite.
        """
        keys, values = self._checked(keys, "keys", self.dim), self._checked(values, "values", self.values)
        if len(keys) != len(values):
            raise ValueError(f"keys are {len(keys)} and values {len(values)}: give one value for each key")
        self.count = self.count + times * len(keys)
        self.key_sum, self.value_sum = self.key_sum + times * keys.sum(0), self.value_sum + times * values.sum(0)
        self.gram, self.cross = self.gram + times * keys.T @ keys, self.cross + times * values.T @ keys
        self._solved = None

    def erase(self, keys: Tensor, values: Tensor) -> None:
        """Take pairs away that were written: keys [N, D], values [N, V]. The memory is as if they never were."""
        if len(keys) > round(float(self.count)):
            raise ValueError(f"{len(keys)} pairs cannot be erased: {float(self.count):.0f} were written")
        self.write(keys, values, -1.0)

    def merge(self, other: ExactMemory) -> None:
        """Add all that another memory of the same sizes has seen."""
        if (self.dim, self.values, self.normalized) != (other.dim, other.values, other.normalized):
            raise ValueError("other is a memory of another dim, of other values or normalized otherwise")
        for name in self.sums():
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self._solved = None

    def widen(self, values: int) -> None:
        """Room for values of a larger size: what was written has 0 there."""
        if values < self.values:
            raise ValueError(f"values must be at least {self.values}, as many as there are, not {values}")
        more = values - self.values
        self.value_sum = torch.cat([self.value_sum, self.value_sum.new_zeros(more)])
        self.cross = torch.cat([self.cross, self.cross.new_zeros(more, self.dim)])
        self.values, self._solved = values, None

    def read(self, keys: Tensor) -> Tensor:
        """What is remembered of keys [N, D]: [N, V], in float64."""
        keys = self._checked(keys, "keys", self.dim)
        shift, scale, matrix, mean = self.solved()
        return ((keys - shift) * scale) @ matrix.T + mean

    def solved(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(shift [D], scale [D], M [V, D], mean [V]): a key is read as M ((k - shift) scale) + mean."""
        if self._solved is None:
            shift, scale = torch.zeros_like(self.key_sum), torch.ones_like(self.key_sum)
            mean = torch.zeros_like(self.value_sum)
            gram, cross = self.gram, self.cross
            if self.normalized and self.count > 0:
                shift, mean = self.key_sum / self.count, self.value_sum / self.count
                gram = gram - self.count * torch.outer(shift, shift)
                cross = cross - self.count * torch.outer(mean, shift)
                spread = gram.diagonal() / self.count
                known = spread > 1e-10 * (spread + shift.square())  # a channel that is always the same tells nothing
                scale = torch.where(known, (spread.clamp_min(1e-300) * self.dim).rsqrt(), 0.0)
                gram, cross = gram * torch.outer(scale, scale), cross * scale
            eye = torch.eye(self.dim, dtype=gram.dtype, device=gram.device)
            matrix = torch.linalg.solve(gram + self.ridge * eye, cross.T).T
            self._solved = shift, scale, matrix, mean
        return self._solved  # type: ignore[return-value]

    def sums(self) -> dict[str, Tensor]:
        """The state, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if not f.init and not f.name.startswith("_")}

    def _checked(self, given: Tensor, name: str, size: int) -> Tensor:
        if given.ndim != 2 or given.shape[1] != size:
            raise ValueError(f"{name} must be [N, {size}], not {list(given.shape)}")
        given = given.to(self.gram)
        if not given.isfinite().all():
            raise ValueError(f"{name} hold a number that is not finite: leave that pair out")
        return given
