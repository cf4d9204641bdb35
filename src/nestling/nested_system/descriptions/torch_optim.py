"""Optimisers of torch as memories of gradients (NL Secs. 4.2-4.4, App. B)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.optim import (
    ASGD,
    LBFGS,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Muon,
    NAdam,
    RAdam,
    RMSprop,
    Rprop,
    SparseAdam,
)  # fmt: skip

from nestling.nested_system.describe import describes
from nestling.nested_system.rules import OptimizerMemory, Rule, like, scalar

HEBBIAN = "−⟨m, g⟩, value-less (NL Eq. 33)"
ELEMENTWISE = "Σᵢ |m gᵢ − P|² + λ |m|², element by element (NL App. B)"


def rate(group: dict[str, Any]) -> str:
    """The step size of a group in words."""
    lr = group.get("lr")
    return "" if lr is None else f"lr {float(lr):g}"


def decayed(group: dict[str, Any], text: str, *, coupled: bool = False) -> str:
    """The weights' update with its weight decay in front."""
    return text if coupled or not group.get("weight_decay") else text.replace("W ← W", "W ← (1 − η λ) W", 1)


def momentum(
    update: str = "m ← β m + g", key: str = "momentum_buffer", macs: int = 1, **options: Any
) -> OptimizerMemory:
    """Gradients summed with exponential forgetting."""
    return OptimizerMemory("momentum", update, HEBBIAN, states={key: like}, macs=macs, **options)


@describes(SGD)
def sgd(optimizer: SGD, group: dict[str, Any]) -> Rule:
    """Gradient descent; with momentum one level more (NL Eqs. 10-13)."""
    if not group["momentum"]:
        return Rule("gradient descent", "W ← W − η g", rate(group))
    kept = momentum(f"m ← {group['momentum']:g} m + g")
    step = "W ← W − η (g + μ m)" if group["nesterov"] else "W ← W − η m"
    return Rule("SGD with momentum", step, rate(group), (kept,))


def moments(
    group: dict[str, Any], first: str = "exp_avg", second: str = "exp_avg_sq", extra: dict | None = None
) -> list[OptimizerMemory]:
    """Adam's two moments: independent of one another, so on one level (NL Sec. 3.1)."""
    b1, b2 = group.get("betas", (0.9, 0.999))
    return [
        OptimizerMemory("first moment", f"m ← {b1:g} m + {1 - b1:.3g} g", ELEMENTWISE,
                        states={first: like, **(extra or {})}),
        OptimizerMemory("second moment", f"v ← {b2:g} v + {1 - b2:.3g} g²", ELEMENTWISE,
                        values="g², the squared gradients", states={second: like}, macs=2),
    ]  # fmt: skip


@describes(Adam, AdamW, NAdam, RAdam, SparseAdam)
def adam(optimizer: Adam, group: dict[str, Any]) -> Rule:
    """The optimal element-wise L2 memory (NL Eqs. 101-105)."""
    extra = {"step": scalar} | ({"mu_product": scalar} if isinstance(optimizer, NAdam) else {})
    kept = moments(group, extra=extra)
    if group.get("amsgrad"):
        kept[1] = replace(kept[1], feeds="largest second moment")
        kept.append(
            OptimizerMemory(
                "largest second moment",
                "v̄ ← max(v̄, v)",
                "—",
                values="v, the second moments",
                reads="second moment",
                states={"max_exp_avg_sq": like},
            )
        )
    decoupled = isinstance(optimizer, AdamW) or group.get("decoupled_weight_decay")
    step = decayed(group, "W ← W − η m̂ / (√v̂ + ε)", coupled=not decoupled)
    return Rule(type(optimizer).__name__, step, rate(group), tuple(kept), macs=3)


@describes(Adamax)
def adamax(optimizer: Adamax, group: dict[str, Any]) -> Rule:
    """Adam with the largest gradient in place of the second moment."""
    kept = moments(group, second="exp_inf", extra={"step": scalar})
    largest = OptimizerMemory("largest gradient", "u ← max(β₂ u, |g|)", "—", values="|g|", states={"exp_inf": like})
    return Rule("Adamax", "W ← W − η m̂ / u", rate(group), (kept[0], largest), macs=2)


@describes(Adagrad)
def adagrad(optimizer: Adagrad, group: dict[str, Any]) -> Rule:
    """All squared gradients, never forgotten (NL Eqs. 106-111)."""
    kept = OptimizerMemory(
        "sum of squares", "v ← v + g²", ELEMENTWISE, values="g²", states={"sum": like, "step": scalar}
    )
    return Rule("Adagrad", "W ← W − η g / (√v + ε)", rate(group), (kept,), macs=2)


@describes(RMSprop)
def rmsprop(optimizer: RMSprop, group: dict[str, Any]) -> Rule:
    """A second moment, and on request a mean and a momentum of the scaled gradients."""
    second = OptimizerMemory("second moment", "v ← α v + (1 − α) g²", ELEMENTWISE, values="g²", macs=2,
                   states={"square_avg": like, "step": scalar})  # fmt: skip
    kept = [second]
    if group["centered"]:
        kept.append(OptimizerMemory("first moment", "ḡ ← α ḡ + (1 − α) g", ELEMENTWISE, states={"grad_avg": like}))
    if group["momentum"]:
        kept = [replace(memory, feeds="momentum") for memory in kept]
        kept.append(momentum("m ← μ m + g / √v", values="g / √v, the scaled gradients"))
    return Rule("RMSprop", "W ← W − η m" if group["momentum"] else "W ← W − η g / √v", rate(group), tuple(kept), macs=2)


@describes(Adadelta)
def adadelta(optimizer: Adadelta, group: dict[str, Any]) -> Rule:
    """Second moments of gradients and of the steps taken."""
    squares = OptimizerMemory("second moment", "v ← ρ v + (1 − ρ) g²", ELEMENTWISE, values="g²", macs=2,
                    states={"square_avg": like, "step": scalar})  # fmt: skip
    steps = OptimizerMemory("step sizes", "d ← ρ d + (1 − ρ) Δ²", ELEMENTWISE, values="Δ², the squared steps", macs=2,
                  reads="second moment", states={"acc_delta": like})  # fmt: skip
    return Rule("Adadelta", "W ← W − η √d / √v g", rate(group), (squares, steps), macs=3)


@describes(Rprop)
def rprop(optimizer: Rprop, group: dict[str, Any]) -> Rule:
    """Step sizes that grow while a gradient keeps its sign."""
    last = OptimizerMemory(
        "last gradient", "p ← g", "½ |p − g|²", states={"prev": like, "step": scalar}, feeds="step sizes", macs=0
    )
    sizes = OptimizerMemory(
        "step sizes", "η ← η · (1.2 or 0.5, by the sign of p g)", "—", values="sign of p g", states={"step_size": like}
    )
    return Rule("Rprop", "W ← W − η sign g", "a step size for each weight", (last, sizes))


@describes(ASGD)
def asgd(optimizer: ASGD, group: dict[str, Any]) -> Rule:
    """Gradient descent whose weights are averaged: the average is a memory of the weights."""
    average = OptimizerMemory(
        "average of weights",
        "a ← a + μ (W − a)",
        "½ |a − W|²",
        values="W, the weights",
        reads="weights",
        feeds="",
        states={"ax": like, "mu": scalar, "eta": scalar, "step": scalar},
    )
    return Rule("ASGD", "W ← (1 − λ η) W − η g", rate(group), (average,))


def _factored(parameter: Tensor) -> list[tuple[int, ...]]:
    shape = tuple(parameter.shape)
    return [(*shape[:-1], 1), (*shape[:-2], 1, shape[-1])]


@describes(Adafactor)
def adafactor(optimizer: Adafactor, group: dict[str, Any]) -> Rule:
    """The second moment as row and column means."""

    def rows(p: Tensor) -> list[tuple[int, ...]]:
        return _factored(p)[:1] if p.ndim > 1 else []

    def columns(p: Tensor) -> list[tuple[int, ...]]:
        return _factored(p)[1:] if p.ndim > 1 else []

    def whole(p: Tensor) -> list[tuple[int, ...]]:
        return [] if p.ndim > 1 else like(p)

    kept = OptimizerMemory("second moment", "row and column means of g²", ELEMENTWISE, values="g²", macs=2,
                 states={"row_var": rows, "col_var": columns, "variance": whole, "step": scalar})  # fmt: skip
    return Rule("Adafactor", decayed(group, "W ← W − η g / √(r cᵀ)"), rate(group), (kept,), macs=3)


def newton_schulz(parameter: Tensor, steps: int) -> int:
    """Multiply-adds of the quintic iteration X ← a X + (b A + c A²) X, A = X Xᵀ on the smaller side."""
    if parameter.ndim < 2:
        return 0
    small, large = sorted((parameter.shape[0], parameter.numel() // parameter.shape[0]))
    return steps * (2 * small * small * large + small**3)


def orthogonalization(steps: int, source: str = "momentum", per: Any = 1, **options: Any) -> OptimizerMemory:
    """Newton-Schulz: an inner problem of its own, solved in `steps` steps for each gradient (NL Eqs. 42-44)."""
    return OptimizerMemory(
        "orthogonalization", "O ← O − ζ ∂/∂O |OᵀO − I|², O₀ = m / |m|  (NL Eq. 44)", "|P(g)ᵀ P(g) − I|² (NL Eq. 43)",
        keys="m, the momentum", values="its nearest orthogonal matrix", retrieval="O", rate=per * steps, steps=steps,
        reads=source, macs=0, work=lambda p: newton_schulz(p, 1), rule="Newton-Schulz", **options,
    )  # fmt: skip


@describes(Muon)
def muon(optimizer: Muon, group: dict[str, Any]) -> Rule:
    """Momentum through the inner steps of an orthogonalisation."""
    steps = group["ns_steps"]
    kept = momentum("m ← μ m + (1 − μ) g", feeds="orthogonalization")
    return Rule("Muon", decayed(group, "W ← W − η O"), rate(group), (kept, orthogonalization(steps)))


@describes(LBFGS)
def lbfgs(optimizer: LBFGS, group: dict[str, Any]) -> Rule:
    """The last gradients and steps: a window of pairs, read as an inverse curvature."""
    # torch keeps them flat, in the state of the first parameter: the shapes are those of a run
    names = (
        "old_dirs",
        "old_stps",
        "ro",
        "prev_flat_grad",
        "d",
        "t",
        "H_diag",
        "al",
        "prev_loss",
        "func_evals",
        "n_iter",
    )
    kept = OptimizerMemory(
        "curvature pairs", f"keep the last {group['history_size']} pairs of step and change of gradient", "|H y − s|²",
        keys="y, changes of the gradient", values="s, the steps taken", states=dict.fromkeys(names, lambda p: []),
        macs=4 * group["history_size"], rule="a window of the last pairs", solver="non-parametric",
    )  # fmt: skip
    return Rule("LBFGS", "W ← W − η H g", rate(group), (kept,))
