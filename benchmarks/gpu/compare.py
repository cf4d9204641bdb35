"""How far two results lie apart, and what counts as equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.clock import on_gpu
from benchmarks.gpu.record import Record

# relative, in the Frobenius norm: what float32 sums in another order, TF32's 11 bits, and bfloat16's 8 may differ by
ALLOWED = {"float32": 1e-4, "tf32": 1e-2, "bf16": 2e-2}
GRADIENTS = {"float32": 1e-4, "tf32": 2e-2, "bf16": 5e-2}
# a gradient smaller than this part of the largest one is measured against that part; of bfloat16, its own rounding
FLOOR = {"float32": 1e-3, "tf32": 1e-3, "bf16": 2**-8}


class Lost(Exception):
    """The device answers no more: nothing else can be checked in this process."""


def distance(
    got: dict[str, Tensor | None], want: dict[str, Tensor | None], precision: str = "float32"
) -> dict[str, Any]:
    """The largest of |a - b| / |b| over named tensors, and whose it is; NaN counts as largest."""
    norms = {name: float(t.detach().double().norm()) for name, t in want.items() if t is not None}
    floor, worst, whose = FLOOR[precision] * max(norms.values(), default=0.0), -1.0, ""
    for name, b in want.items():
        a = got[name]
        if b is None or a is None:
            if (a is None) != (b is None):
                return {"error": float("inf"), "where": f"{name}: only one of the two has a gradient"}
            continue
        gap = float((a.detach().cpu().double() - b.detach().cpu().double()).norm()) / max(norms[name], floor, 1e-30)
        if not gap <= worst:
            worst, whose = gap, name
        if gap != gap:
            break
    return {"error": worst, "where": whose}


def verdict(
    values: dict[str, Any], gradients: dict[str, Any] | None, precision: str, slack: float = 1.0
) -> dict[str, Any]:
    """One row: the errors, what is allowed (`slack` times as much), and whether they keep to it."""
    allowed = slack * ALLOWED[precision]
    found = {"values": values["error"], "of": values["where"], "allowed": allowed}
    good = values["error"] <= allowed
    if gradients is not None:
        found |= {"gradients": gradients["error"], "worst gradient": gradients["where"]}
        good = good and gradients["error"] <= slack * GRADIENTS[precision]
    return found | {"ok": bool(good)}


def weigh(y: Tensor) -> Tensor:
    """A scalar every entry of y has its own weight in."""
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).to(y.dtype).to(y.device)
    return (y * weights.view_as(y)).sum() / y.numel() ** 0.5


def check(record: Record, name: str, function: Callable[[], dict[str, Any]], seconds: float = 30.0) -> None:
    """Run one check; raises Lost if it broke the device."""
    record.attempt("checks", name, function, seconds)
    if on_gpu():
        try:
            torch.cuda.synchronize()
        except Exception as error:
            raise Lost(f"after the check {name!r}: {error}") from error
