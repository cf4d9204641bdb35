"""How often a memory is updated, and which of two is the faster (NL Def. 2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

UNITS = ("token", "step")


@dataclass(frozen=True)
class Frequency:
    """Updates of a memory per unit of time (NL Def. 2).

    The unit is one data point (a token of a text, a patch or a sample elsewhere) for what learns inside a context, and
    one outer step for what an optimiser trains: how many tokens a step has is the run's business, not the model's.

    Args:
        rate: updates per unit: a whole number, a Fraction, 0 (never updated) or `math.inf` (attention: the solution
            is found anew for every token).
        unit: "token" or "step".

    Raises:
        ValueError, TypeError: a negative rate, a rate that is no exact number, an unknown unit.
    """

    rate: Fraction | float
    unit: str = "token"

    def __post_init__(self) -> None:
        rate = self.rate
        if isinstance(rate, bool) or not (isinstance(rate, (int, Fraction)) or rate in (0, math.inf)):
            raise TypeError(f"rate must be a whole number, a Fraction or math.inf; got {rate!r}")
        if rate < 0:
            raise ValueError(f"rate must not be negative; got {rate}")
        if self.unit not in UNITS:
            raise ValueError(f"unit must be one of {', '.join(UNITS)}; got {self.unit!r}")
        object.__setattr__(self, "rate", math.inf if rate == math.inf else Fraction(rate))
        if rate in (0, math.inf):  # never and always have no unit
            object.__setattr__(self, "unit", "token")

    @classmethod
    def every(cls, period: int | float, unit: str = "token") -> Frequency:
        """One update per `period` units; an infinite period is never."""
        return cls(0 if period == math.inf else Fraction(1, period), unit)

    def times(self, factor: int | Fraction) -> Frequency:
        """Updated `factor` times as often."""
        return Frequency(self.rate * factor if 0 < self.rate < math.inf else self.rate, self.unit)

    def per_token(self, tokens_per_step: int | Fraction | None = None) -> Fraction | float | None:
        """Updates per token; None where that needs the tokens of a step and they are unknown."""
        if self.unit == "token":
            return self.rate
        return None if tokens_per_step is None else self.rate / tokens_per_step

    def to_json(self) -> dict[str, str]:
        """Exact: the rate as a fraction, or "inf"."""
        return {"rate": str(self.rate), "unit": self.unit}

    @classmethod
    def from_json(cls, values: dict[str, str]) -> Frequency:
        """The frequency that `to_json` wrote."""
        rate = values["rate"]
        return cls(math.inf if rate == "inf" else Fraction(rate), values["unit"])

    def __str__(self) -> str:
        if self.rate in (0, math.inf):
            return "∞" if self.rate else "0"
        above, below = self.rate.numerator, self.rate.denominator
        return f"{above:,} / {self.unit}" if below == 1 else f"{above:,} / {below:,} {self.unit}s"


ALWAYS = Frequency(math.inf)
NEVER = Frequency(0)
EVERY_TOKEN = Frequency(1)
EVERY_STEP = Frequency(1, "step")
