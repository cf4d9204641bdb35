"""Checks every optimiser of this package makes before it changes anything; each names the argument and the remedy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from nestling.optim.sharding import agreed, local

NONFINITE = ("skip", "raise", "ignore")
LARGEST = 1e15  # norm of a usable gradient: well below the root of float32's largest number


def check_number(name: str, value: object, low: float = 0.0, *, above: bool = False) -> None:
    """A finite real number that is at least `low` (`above`: larger than `low`)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, not {type(value).__name__} ({value!r})")
    if not math.isfinite(value) or value < low or (above and value == low):
        raise ValueError(f"{name} must be finite and {'above' if above else 'at least'} {low:g}, not {value}")


def check_lr(lr: object) -> None:
    """A learning rate: a number that is not negative, or a tensor holding one."""
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr as a tensor must hold one number, not be of shape {list(lr.shape)}")
        if not lr.is_floating_point():
            raise TypeError(f"lr as a tensor must be floating point, not {lr.dtype}")
        lr = lr.item()
    check_number("lr", lr)


def scalar(lr: float | Tensor) -> float | Tensor:
    """A learning rate for arithmetic: a tensor of one element, whatever its shape, as one without dimensions."""
    return lr.reshape(()) if isinstance(lr, Tensor) else lr


def check_fraction(name: str, value: object) -> None:
    """A number in [0, 1): what an average keeps of itself."""
    check_number(name, value)
    if not value < 1:
        raise ValueError(f"{name} must lie in [0, 1), not {value}")


def check_whole(name: str, value: object, low: int = 1) -> None:
    """A whole number that is at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, not {type(value).__name__} ({value!r})")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, not {value}")


def check_periods(periods: object) -> tuple[int, ...]:
    """Steps between updates of each time scale, fastest first: (1, f1, f2, ...), rising; returns them as a tuple."""
    if not isinstance(periods, Sequence) or isinstance(periods, str) or not periods:
        raise TypeError(f"periods must be a sequence of whole numbers such as (1, 16), not {periods!r}")
    for period in periods:
        check_whole("periods", period)
    if periods[0] != 1:
        raise ValueError(f"periods must begin with 1, the scale that moves every step; got {tuple(periods)}")
    if any(slow <= fast for fast, slow in zip(periods, periods[1:])):
        raise ValueError(f"periods must rise, as (1, 16, 256) does; got {tuple(periods)}")
    return tuple(periods)


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """One of a few names."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}")


def check_parameter(parameter: Tensor, name: str = "") -> None:
    """A parameter an optimiser can hold: a real floating-point tensor (0-d and empty ones included)."""
    if not parameter.is_floating_point():
        raise TypeError(f"parameter {name}{list(parameter.shape)} must be real floating point, not {parameter.dtype}")


def check_gradient(parameter: Tensor, name: str = "") -> None:
    """A gradient that can be used: dense, of its parameter's shape, type and device. `parameter.grad` must be there."""
    gradient, where = parameter.grad, f"the gradient of parameter {name}{list(parameter.shape)}"
    if gradient.layout != torch.strided:
        raise ValueError(
            f"{where} is sparse ({gradient.layout}); build the embedding with sparse=False, "
            "or give that parameter to torch.optim.SparseAdam"
        )
    if gradient.shape != parameter.shape:
        raise ValueError(f"{where} has shape {list(gradient.shape)}; clear it (zero_grad) after changing the parameter")
    if gradient.dtype != parameter.dtype or gradient.device != parameter.device:
        raise ValueError(
            f"{where} is {gradient.dtype} on {gradient.device}, the parameter {parameter.dtype} on {parameter.device}; "
            "bring both to one type and device before the step"
        )


@torch.compiler.disable
def finite(gradients: Sequence[Tensor], nonfinite: str = "skip") -> bool:
    """Whether a step may be taken: no gradient holds NaN or infinity or has a norm above `LARGEST`.

    Args:
        gradients: dense gradients, any devices; one value is read back per device and type.
        nonfinite: "skip" answers False, so that the caller leaves weights, state and phase as they were; "raise" raises
            FloatingPointError; "ignore" does not look.
    """
    if nonfinite == "ignore":
        return True
    by_kind: dict[tuple, list[Tensor]] = {}
    for gradient in map(local, gradients):
        by_kind.setdefault((gradient.device, torch.promote_types(gradient.dtype, torch.float32)), []).append(gradient)
    sound = all(
        float(torch.stack(torch._foreach_norm(part, 2, dtype=dtype)).max()) <= LARGEST  # False for NaN
        for (_, dtype), part in by_kind.items()
    )
    sound = agreed(sound, gradients)
    if not sound and nonfinite == "raise":
        raise FloatingPointError(
            f'a gradient holds NaN or infinity or has a norm above {LARGEST:g}; nonfinite="skip" leaves such steps out'
        )
    return sound
