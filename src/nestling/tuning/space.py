"""What is searched: ranges and choices by name, from text such as `lr=1e-4:1e-1:log` or `periods=1,8|1,16`."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from nestling.training.config import unknown

SCALES = ("linear", "log", "int")
M3 = {"lr": 3e-3, "alpha": 0.5, "periods": (1, 16)}  # where a search begins: M3's defaults, and a usual rate


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, even on a "linear" or "log" scale, or whole ("int")."""

    low: float
    high: float
    scale: str = "linear"

    def suggest(self, trial: Any, name: str) -> float | int:
        if self.scale == "int":
            return trial.suggest_int(name, int(self.low), int(self.high))
        return trial.suggest_float(name, self.low, self.high, log=self.scale == "log")

    def holds(self, value: Any) -> bool:
        return isinstance(value, (int, float)) and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.low:g}:{self.high:g}" + ("" if self.scale == "linear" else f":{self.scale}")


@dataclass(frozen=True)
class Choice:
    """One of a few values, each as the text it was given as ("1,16")."""

    values: tuple[str, ...]

    def suggest(self, trial: Any, name: str) -> str:
        return trial.suggest_categorical(name, self.values)

    def holds(self, value: Any) -> bool:
        return text_of(value) in self.values

    def __str__(self) -> str:
        return "|".join(self.values)


class Space(dict[str, Range | Choice]):
    """Ranges and choices by name."""

    @classmethod
    def parse(cls, items: list[str]) -> Space:
        """Read `NAME=LOW:HIGH[:log|int]` and `NAME=A|B|C`; ValueError with what was meant."""
        space = cls()
        for item in items:
            name, sign, text = item.partition("=")
            if not sign or not name.strip() or not text.strip():
                raise ValueError(f"--space takes NAME=LOW:HIGH[:log|int] or NAME=A|B|C, not {item!r}")
            chosen = "|" in text or ":" not in text
            space[name.strip()] = Choice(tuple(text.split("|"))) if chosen else _range(item, text)
        return space

    def suggest(self, trial: Any) -> dict[str, Any]:
        """A value of each name: numbers of ranges, texts of choices."""
        return {name: kind.suggest(trial, name) for name, kind in self.items()}

    def start(self) -> dict[str, Any]:
        """The defaults that lie in the space, as the first trial; {} if one does not."""
        found = {name: M3[name] for name, kind in self.items() if name in M3 and kind.holds(M3[name])}
        if len(found) < len(self):
            return {}
        return {n: text_of(v) if isinstance(self[n], Choice) else v for n, v in found.items()}

    def __str__(self) -> str:
        return ", ".join(f"{name}={kind}" for name, kind in self.items())


DEFAULTS = Space(
    lr=Range(3e-4, 0.1, "log"),
    alpha=Range(0.05, 1.5),
    periods=Choice(("1", "1,4", "1,16", "1,64", "1,8,64")),
)


def _range(item: str, text: str) -> Range:
    low, _, rest = text.partition(":")
    high, _, scale = rest.partition(":")
    scale = scale or "linear"
    if scale not in SCALES:
        raise ValueError(f"{item!r}: " + unknown("scale", scale, SCALES))
    try:
        found = Range(float(low), float(high), scale)
    except ValueError:
        raise ValueError(f"--space takes NAME=LOW:HIGH[:log|int] with numbers, not {item!r}") from None
    if not (math.isfinite(found.low) and math.isfinite(found.high) and found.low < found.high):
        raise ValueError(f"the range of {item!r} must rise from a finite low to a finite high")
    if scale == "log" and found.low <= 0:
        raise ValueError(f"{item!r}: a log range must begin above 0")
    if scale == "int" and (found.low % 1 or found.high % 1):
        raise ValueError(f"{item!r}: an int range must have whole ends")
    return found


def text_of(value: Any) -> str:
    """A value as it stands on a command line: (1, 16) is "1,16", 0.003 is "0.003"."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(text_of, value))
    return format(value, ".6g") if isinstance(value, float) else str(value)


def value_of(name: str, text: Any) -> Any:
    """The Python value of a suggested one: `periods` is a tuple of whole numbers, another choice JSON or text."""
    if not isinstance(text, str):
        return text
    if name == "periods":
        try:
            return tuple(int(part) for part in text.split(","))
        except ValueError:
            raise ValueError(f"periods must be whole numbers with commas between, such as 1,16; not {text!r}") from None
    try:
        return json.loads(text)
    except ValueError:
        return text
