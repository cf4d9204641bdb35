"""The optimisers that are compared, by name, each made for a whole model.

Those for matrices (Muon, AdaMuon, M3) share one split of the parameters: weights of hidden linear layers on one side;
embeddings, heads and vectors on the side of the AdamW rule, at the same learning rate. That is fair because their
matrix updates are scaled to the root mean square of AdamW's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from experiments.shared.study import Contender

ADAM = {"betas": (0.9, 0.95)}  # of AdamW and of every AdamW rule beside a matrix rule
# M3's defaults, written out: results belong to these settings, whatever the defaults become
M3 = {
    "betas": [0.95, 0.95, 0.9], "alpha": 0.25, "periods": [1, 16], "ns_steps": 5, "nesterov": True,
    "second_moment": "direction",
}  # fmt: skip
GRADIENT = M3 | {"betas": [0.95, 0.999, 0.9], "second_moment": "gradient"}  # where Algorithm 1 has it


@dataclass
class OptimizerContender(Contender):
    """One optimiser of a comparison: its name in `BUILDERS`, and options of its own."""

    optimizer: str
    options: dict[str, Any] = field(default_factory=dict)


def five() -> list[OptimizerContender]:
    """AdamW, Muon, AdEMAMix, AdaMuon and M3, also with the second moment of the gradient."""
    names = {"AdamW": "adamw", "Muon": "muon", "AdEMAMix": "ademamix", "AdaMuon": "adamuon"}
    return [
        *(OptimizerContender(name, optimizer) for name, optimizer in names.items()),
        OptimizerContender("M3", "m3", dict(M3)),
        OptimizerContender("M3, second moment of the gradient", "m3", dict(GRADIENT)),
    ]


class Together:
    """Several optimisers that step as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = [o for o in optimizers if o.param_groups and o.param_groups[0]["params"]]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def make(
    contender: OptimizerContender, model: nn.Module, lr: float, *, weight_decay: float = 0.0, steps: int = 0
) -> torch.optim.Optimizer | Together:
    """The contender's optimiser for a model; `steps` is the length of the run, for schedules inside an optimiser."""
    return BUILDERS[contender.optimizer](model, lr, weight_decay, steps, dict(contender.options))


def check(contender: OptimizerContender) -> None:
    """Build the contender for a small model and take a step; ValueError with its name if it refuses."""
    model = nn.Linear(4, 4, bias=False)
    model(torch.ones(1, 4)).sum().backward()
    try:
        make(contender, model, 1e-3, steps=10).step()
    except (TypeError, ValueError) as error:
        raise ValueError(f"contender {contender.name!r}: {error}") from error


def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(weights of hidden linear layers, all other parameters): embeddings and the output head are no hidden layers."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    outside = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)] + ([head.weight] if head else [])
    hidden = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)} - {id(p) for p in outside}
    chosen = [p for p in model.parameters() if id(p) in hidden]
    return chosen, [p for p in model.parameters() if id(p) not in hidden]


def _decayed(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Groups in which vectors are not decayed."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _simple(cls: type, **defaults: Any) -> Callable:
    def build(model: nn.Module, lr: float, weight_decay: float, steps: int, options: dict[str, Any]):
        return cls(_decayed([*model.parameters()], weight_decay), lr=lr, **(defaults | options))

    return build


def _ours(name: str) -> Callable:
    def build(model: nn.Module, lr: float, weight_decay: float, steps: int, options: dict[str, Any]):
        from nestling import optim

        return getattr(optim, name)(_decayed([*model.parameters()], weight_decay), lr=lr, **options)

    return build


def _muon(model: nn.Module, lr: float, weight_decay: float, steps: int, options: dict[str, Any]):
    """`torch.optim.Muon` by `nestling.training.muon`: batched over equal shapes, float32 on a CPU."""
    from nestling.training.muon import Muon

    matrices, rest = split(model)
    options = {"adjust_lr_fn": "match_rms_adamw"} | options
    made = [Muon(matrices, lr=lr, weight_decay=weight_decay, **options)] if matrices else []
    return Together(*made, *([torch.optim.AdamW(_decayed(rest, weight_decay), lr=lr, **ADAM)] if rest else []))


def _ademamix(model: nn.Module, lr: float, weight_decay: float, steps: int, options: dict[str, Any]):
    """AdEMAMix with the schedules its paper gives alpha and beta3, over the whole run."""
    cls = _pytorch_optimizer("AdEMAMix")
    options = {"betas": (*ADAM["betas"], 0.9999), "t_alpha_beta3": float(steps or 1), "weight_decouple": True} | options
    return cls(_decayed([*model.parameters()], weight_decay), lr=lr, **options)


def _adamuon(model: nn.Module, lr: float, weight_decay: float, steps: int, options: dict[str, Any]):
    """pytorch_optimizer's AdaMuon: the second moment of every entry of the direction."""
    return _like_muon("AdaMuon", model, lr, weight_decay, options)


def _normuon(model: nn.Module, lr: float, weight_decay: float, steps: int, options: dict[str, Any]):
    """pytorch_optimizer's NorMuon: the second moment of every row of the direction; steps as large as AdamW's."""
    return _like_muon("NorMuon", model, lr, weight_decay, {"update_scale": "match_rms"} | options)


def _like_muon(name: str, model: nn.Module, lr: float, weight_decay: float, options: dict[str, Any]):
    """One of pytorch_optimizer's, orthogonalised by `nestling.ops`: its own bfloat16 products are slow on a CPU."""
    from nestling.ops.orthogonalize import orthogonalize

    class Muon(_pytorch_optimizer(name)):
        @staticmethod
        def _orthogonalize(group: dict[str, Any], updates: list[torch.Tensor]) -> list[torch.Tensor]:
            tall = [u.shape[0] > u.shape[1] for u in updates]
            wide = torch.stack([u.mT if t else u for u, t in zip(updates, tall)])
            done = orthogonalize(wide, group["ns_steps"])
            return [u.mT.contiguous() if t else u for u, t in zip(done.unbind(), tall)]

    matrices, rest = split(model)
    groups = [{"params": matrices, "use_muon": True, "lr": lr, "weight_decay": weight_decay}] if matrices else []
    adam = [g | {"use_muon": False, "lr": lr, **ADAM} for g in _decayed(rest, weight_decay)]
    return Muon(groups + adam, **({"foreach": None} | options))


def _m3(model: nn.Module, lr: float, weight_decay: float, steps: int, options: dict[str, Any]):
    from nestling import optim

    matrices, rest = split(model)
    groups = [{"params": matrices, "rule": "matrix", "weight_decay": weight_decay}] if matrices else []
    groups += [g | {"rule": "adamw"} for g in _decayed(rest, weight_decay)]
    return optim.M3(groups, lr=lr, **({"adam_betas": ADAM["betas"]} | options))


def _dgd(model: nn.Module, lr: float, weight_decay: float, steps: int, options: dict[str, Any]):
    from nestling.optim import DGD

    return DGD(model, lr=lr, weight_decay=weight_decay, **options)


def _pytorch_optimizer(name: str) -> type:
    try:
        import pytorch_optimizer
    except ImportError:
        raise ValueError(f"{name} needs the package pytorch_optimizer: pip install pytorch_optimizer") from None
    return getattr(pytorch_optimizer, name)


BUILDERS: dict[str, Callable] = {
    "sgd": _simple(torch.optim.SGD),
    "momentum": _simple(torch.optim.SGD, momentum=0.9),
    "adam": _simple(torch.optim.Adam),
    "adamw": _simple(torch.optim.AdamW, fused=True, **ADAM),
    "muon": _muon,
    "ademamix": _ademamix,
    "adamuon": _adamuon,
    "normuon": _normuon,
    "delta momentum": _ours("DeltaMomentum"),
    "deep momentum": _ours("DeepMomentum"),
    "preconditioned momentum": _ours("PreconditionedMomentum"),
    "dgd": _dgd,
    "m3": _m3,
}
