"""nestling's optimisers as memories of gradients (NL Secs. 4.4, 4.5, 7.2)."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from nestling.nested_system.describe import describes
from nestling.nested_system.descriptions.torch_optim import (
    ELEMENTWISE,
    HEBBIAN,
    decayed,
    moments,
    newton_schulz,
    orthogonalization,
    rate,
)
from nestling.nested_system.rules import OptimizerMemory, Rule, at_least_float32, like, scalar
from nestling.optim.m3_options import moment_of


@describes("nestling.optim.base.MemoryOptimizer")
def memory_optimizer(optimizer: Any, group: dict[str, Any]) -> Rule:
    """A momentum with choices: what it is asked for says which (NL Eqs. 47-52)."""
    memory = optimizer.memory(group)
    kind, states = type(memory.architecture).__name__, memory.architecture
    erase, preconditioner = memory.objective.erase, memory.preconditioner
    deep = kind == "MLP" and memory.architecture.hidden > 0
    value = "P g" if preconditioner else "g"
    key = "k, the rows of g" + (" at norm 1" if memory.features == "unit" else "")
    decay, write = f"{memory.decay:g}", "" if memory.rate == 1 else f"{memory.rate:.3g} "
    if deep:
        update = f"θ ← {decay} θ − {write}∂L/∂θ, for B, W₁, W₂"
    elif erase:
        update = f"m ← m ({decay} I − e kᵀk) − (e / {erase:g}) {value}"
    else:
        update = f"m ← {decay} m − {write}{value}"
    objective = (
        f"½ {erase:g} |m(k) + {value} / {erase:g}|²  (NL Eq. 49)" if erase else HEBBIAN.replace("g⟩", f"−{value}⟩")
    )
    retrieval = "m(g) = B + W₁ tanh(W₂ g)  (NL Eq. 50)" if deep else "m"
    names = _state_names(states.start)
    kept = [
        OptimizerMemory(
            "deep momentum" if deep else "delta momentum" if erase else "momentum", update, objective,
            keys=key if deep or erase else "—", values=f"−{value}", retrieval=retrieval, states=names,
            macs=1 + 2 * bool(erase), work=_mlp_work(memory.architecture) if deep else None,
            reads="preconditioner" if preconditioner else "gradient", dtype=at_least_float32,
        )
    ]  # fmt: skip
    if preconditioner:
        kept.append(_preconditioner(preconditioner, kept[0].kind))
    return Rule(type(optimizer).__name__, decayed(group, "W ← W + η m(g)"), rate(group), tuple(kept))


def _preconditioner(preconditioner: Any, feeds: str) -> OptimizerMemory:
    """P as a memory of its own: running averages, or inner steps."""
    kind = type(preconditioner).__name__
    texts = {
        "Diagonal": ("H ← β H + (1 − β) g²", "Σᵢ |m gᵢ − P|² + λ |m|² (NL App. B)", "g²"),
        "Outer": ("H ← β H + (1 − β) g gᵀ", "|m g − P|² (NL Eqs. 106-111)", "g gᵀ"),
        "Orthogonal": ("O ← O − ζ ∂/∂O |OᵀO − I|²", "|P(g)ᵀ P(g) − I|² (NL Eq. 43)", "the nearest orthogonal matrix"),
    }
    if kind not in texts:
        return OptimizerMemory(
            "unknown",
            "?",
            "?",
            keys="g",
            values="?",
            feeds=feeds,
            solver="unknown",
            rule="",
            states=_state_names(preconditioner.start),
        )
    update, objective, values = texts[kind]
    steps = getattr(preconditioner, "steps", 1)
    return OptimizerMemory(
        "preconditioner",
        update,
        objective,
        keys="g",
        values=values,
        retrieval="P g",
        feeds=feeds,
        rate=steps,
        steps=steps,
        states=_state_names(preconditioner.start),
        macs=2,
        work=None if kind == "Diagonal" else _square_work(kind),
        rule="Newton-Schulz" if kind == "Orthogonal" else "gradient descent, one step",
        dtype=at_least_float32,
    )


def _square_work(kind: str):
    def work(parameter: Tensor) -> int:
        rows = parameter.shape[0] if parameter.ndim > 1 else 1
        small, large = sorted((rows, parameter.numel() // max(rows, 1)))
        return newton_schulz(parameter, 1) if kind == "Orthogonal" else 2 * small * small * large + small**3

    return work


def _mlp_work(architecture: Any):
    def work(parameter: Tensor) -> int:
        return parameter.numel() * (1 + 6 * architecture.hidden)  # W₁ and W₂: forward, gradient, read

    return work


@describes("nestling.optim.dgd.DGD")
def dgd(optimizer: Any, group: dict[str, Any]) -> Rule:
    """Gradient descent on an L2 objective: a layer forgets what it answers before it learns (NL Eqs. 56, 57)."""
    erase = f"{group['erase']:g} " if group["erase"] != 1 else ""
    update = f"W ← W (I − {erase}e x xᵀ) − e ∂L/∂y xᵀ,  e = η / (1 + η {erase}|x|²)"
    objective = f"½ {erase}|W x|² − ⟨W x, u⟩ + |W − Wₜ|² / 2η  (NL Eq. 56)"
    kept = ()
    if group["momentum"]:
        states = _state_names(optimizer.memory(group).start)
        kept = (
            OptimizerMemory(
                "momentum",
                f"m ← {group['momentum']:g} m + Δ",
                HEBBIAN,
                values="Δ, the steps it would take",
                states=states,
                dtype=at_least_float32,
            ),
        )
        update = update.replace("W ← W (", "Δ = W (") + ";  W ← W + m"
    return Rule("DGD", update, rate(group), kept, macs=3, objective=objective)


@describes("nestling.optim.m3.M3")
def m3(optimizer: Any, group: dict[str, Any]) -> Rule:
    """Momenta of several periods, each orthogonalised, over a second moment (NL Alg. 1, Eq. 75); AdamW for vectors."""
    steps, average = group["ns_steps"], group["accumulation"] == "ema"
    betas, periods = group["betas"], tuple(group["periods"])

    def kept_in(state: str, parameter: torch.dtype) -> torch.dtype:
        if state[0] != "o" or (group["slow_dtype"] is None and (not average or parameter == torch.float64)):
            return at_least_float32(state, parameter)
        return group["slow_dtype"] or torch.bfloat16

    fast = f"m₁ ← {betas[0]:g} m₁ + {1 - betas[0]:.3g} g" if average else f"m₁ ← m₁ + {betas[0]:g} g"
    kept = [
        OptimizerMemory("momentum", fast, HEBBIAN, states={"m1": like, "step": scalar}, feeds="orthogonalization"),
        orthogonalization(steps),
    ]
    above = "O₁ + α O₂" if len(periods) > 1 else "O₁"
    moment = moment_of(group)
    if moment:
        taken, what = ("g", "gradients") if moment == "gradient" else (f"({above})", "directions")
        square = f"v ← {betas[1]:g} v + {1 - betas[1]:.3g} {taken}²" if average else f"v ← v + {betas[1]:g} {taken}²"
        values = f"{taken}², the squared {what}"
        kept.append(OptimizerMemory("second moment", square, ELEMENTWISE, values=values, states={"v": like}, macs=2))
    for scale, period in enumerate(periods[1:], 2):
        kind = "slow momentum" if len(periods) == 2 else f"slow momentum {scale}"
        beta = betas[min(scale, len(betas) - 1)]
        slow = f"m ← {beta:g} m + {1 - beta:.3g} ḡ" if average else f"m ← m + {beta:g} Σ g"
        kept.append(
            OptimizerMemory(
                kind,
                f"{slow}, over {period:,} steps",
                HEBBIAN,
                values=f"the last {period:,} gradients",
                rate=Fraction(1, period),
                states={f"m{scale}": like, f"o{scale}": like},
                watch=(f"o{scale}",),
                feeds=f"{kind} orthogonalization",
                note="its buffer takes in every gradient; what is read of it changes once a period",
            )
        )
        inner = orthogonalization(steps, kind, Fraction(1, period))
        kept.append(replace(inner, kind=f"{kind} orthogonalization"))
    update = f"W ← W − η ({above}) / (√v + ε)" if moment else f"W ← W − η ({above})"
    own = {"lr": group["lr"], "betas": group["adam_betas"], "weight_decay": group["weight_decay"]}
    adamw = Rule(
        "AdamW",
        decayed(own, "W ← W − η m̂ / (√v̂ + ε)"),
        rate(group),
        tuple(moments(own, extra={"step": scalar})),
        macs=3,
    )
    kept = [replace(inner, dtype=kept_in) for inner in kept]
    adamw = replace(adamw, memories=tuple(replace(inner, dtype=at_least_float32) for inner in adamw.memories))
    if group["rule"] == "adamw":
        return adamw
    return Rule("M3", decayed(group, update), rate(group), tuple(kept), macs=4, takes=lambda p: p.ndim >= 2, also=adamw)


def _state_names(start) -> dict[str, Any]:
    """Names and shapes of the state that `start(parameter)` makes, found on the meta device."""
    names = start(torch.empty(2, 2, device="meta"))

    def shape_of(name: str):
        def shapes(parameter: Tensor) -> list[tuple[int, ...]]:
            return [tuple(start(torch.empty(parameter.shape, device="meta"))[name].shape)]

        return shapes

    return {name: shape_of(name) for name in names}
