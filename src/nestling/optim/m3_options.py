"""The options of an M3 parameter group: what they may be, and the settings they make for a matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nestling.ops.orthogonalize import table
from nestling.optim import checks
from nestling.optim.multiscale import M3Settings
from nestling.optim.parameters import is_table_name

RULES = ("auto", "matrix", "adamw")
VIEWS = (None, "flatten", "batch")
ACCUMULATIONS = ("ema", "sum")
MOMENTS = (None, "direction", "gradient", False, True)


def check_group(group: dict) -> None:
    """Every option of a group, before it is taken."""
    checks.check_lr(group["lr"])
    periods = checks.check_periods(group["periods"])
    checks.check_choice("accumulation", group["accumulation"], ACCUMULATIONS)
    checks.check_choice("rule", group["rule"], RULES)
    checks.check_choice("second_moment", group["second_moment"], MOMENTS)
    if group["view"] not in VIEWS:
        raise ValueError(f"view must be one of {VIEWS}, not {group['view']!r}")
    betas = group["betas"]
    if not isinstance(betas, Sequence) or len(betas) < 2 + (len(periods) > 1):
        raise ValueError(f"betas must hold the fast, the second-moment and the slow ones, not {betas!r}")
    for beta in betas:
        (checks.check_fraction if group["accumulation"] == "ema" else checks.check_number)("betas", beta)
    alphas = group["alpha"] if isinstance(group["alpha"], Sequence) else (group["alpha"],)
    if not alphas:
        raise ValueError("alpha must hold a number, or one per slow scale")
    for alpha in alphas:
        checks.check_number("alpha", alpha)
    if len(alphas) > max(1, len(periods) - 1) or len(betas) > max(3, len(periods) + 1):
        raise ValueError(f"betas {tuple(betas)} and alpha {group['alpha']!r} name more scales than periods {periods}")
    table(group["coefficients"], group["ns_steps"])
    if group["eps"] is not None:
        checks.check_number("eps", group["eps"])
    checks.check_number("weight_decay", group["weight_decay"])
    checks.check_number("adam_eps", group["adam_eps"])
    if not isinstance(group["adam_betas"], Sequence) or len(group["adam_betas"]) != 2:
        raise ValueError(f"adam_betas must be two numbers, not {group['adam_betas']!r}")
    for beta in group["adam_betas"]:
        checks.check_fraction("adam_betas", beta)
    if not isinstance(group["split"], Mapping):
        raise TypeError(f"split must map a part of a name to a number of parts, not {group['split']!r}")


def moment_of(group: dict) -> str | None:
    """Whose second moment a group's matrices keep: "direction", "gradient", or None."""
    own = group["second_moment"]
    if own is None:
        return "direction" if group["accumulation"] == "ema" else "gradient"
    return own if isinstance(own, str) else "gradient" if own else None


def is_matrix(parameter: Tensor, group: dict, index: int) -> bool:
    """Whether a group's parameter of that index is orthogonalised; under "auto" its name has a say."""
    if group["rule"] == "auto" and parameter.ndim == 2 and "param_names" in group:
        return not is_table_name(group["param_names"][index])
    return group["rule"] != "adamw" and parameter.ndim >= 2


def matrix_shape(shape: torch.Size, view: str | None) -> tuple[int, int, int]:
    """(b, m, n): a parameter as a batch of matrices."""
    batch = view == "batch" or (view is None and len(shape) <= 3)
    b = shape[:-2].numel() if batch else 1
    return (b, *shape[-2:]) if batch else (1, shape[0], shape[1:].numel())


def parts_of(parameter: Tensor, group: dict, index: int) -> tuple[tuple[int, ...], int]:
    """Sizes and dimension of the parts a fused matrix is orthogonalised in; () for one part."""
    if not group["split"] or "param_names" not in group:
        return (), -2
    name = group["param_names"][index]
    for pattern, parts in group["split"].items():
        if pattern in name:
            columns = isinstance(parts, (tuple, list)) and len(parts) == 2 and parts[0] == "columns"
            dim, parts = (-1, parts[1]) if columns else (-2, parts)
            length = matrix_shape(parameter.shape, group["view"])[dim]
            sizes = [length // max(parts, 1)] * parts if isinstance(parts, int) else list(parts)
            if sum(sizes) != length or min(sizes) < 1:
                raise ValueError(f"split of {name} must add up to its {length} rows or columns; {parts!r} does not")
            return tuple(sizes), dim
    return (), -2


def _slow(values, count: int) -> tuple[float, ...]:
    """One value per slow scale; the last is repeated."""
    values = (values,) if isinstance(values, (int, float)) else tuple(values)
    return tuple(values[min(i, len(values) - 1)] for i in range(count))


def settings_of(group: dict, shape: torch.Size, sizes: tuple[int, ...], dim: int) -> M3Settings:
    periods, ema = tuple(group["periods"]), group["accumulation"] == "ema"
    fast, beta_v, *slow = group["betas"]
    count = len(periods) - 1
    eps = group["eps"] if group["eps"] is not None else 0.05 if ema else 1e-8
    nesterov = group["nesterov"] if group["nesterov"] is not None else ema
    return M3Settings(
        shape=matrix_shape(shape, group["view"]), lr=checks.scalar(group["lr"]), weight_decay=group["weight_decay"],
        betas=(fast, *_slow(slow, count)), alphas=(1.0, *_slow(group["alpha"], count)), periods=periods,
        moment=moment_of(group), beta_v=beta_v, eps=eps, ema=ema, nesterov=nesterov,
        rms_match=group["rms_match"], ns_steps=group["ns_steps"], coefficients=group["coefficients"],
        ns_dtype=group["ns_dtype"], sizes=sizes, dim=dim,
    )  # fmt: skip
