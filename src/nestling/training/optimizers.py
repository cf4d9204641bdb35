"""Optimisers by name, and one outer step over levels of different speed.

Parameters of a slow level (decision D10) do not move at every step: their gradients are averaged over the steps of a
chunk and their optimiser steps once at its end.
"""

from __future__ import annotations

import importlib
import inspect
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nestling.optim.sharding import is_sharded, sharded_as, whole
from nestling.schedule import Schedule
from nestling.training.config import OptimConfig, unknown
from nestling.training.levels import freeze

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

BUILT_IN = ("adamw", "muon", "m3")


@dataclass
class OptimizerStep:
    """What an outer step did: the gradient norm before clipping, whether it was skipped, which slow levels stepped."""

    grad_norm: float
    skipped: bool
    slow_levels: tuple[int, ...] = ()


@dataclass
class LevelGroup:
    """The parameters that step together: `level` None steps every time, else once per chunk of that slow level."""

    level: int | None
    names: list[str]
    params: list[nn.Parameter]
    optimizers: list[torch.optim.Optimizer]
    sums: list[Tensor] | None = None  # gradients summed since the last boundary (slow levels)
    count: int = 0  # steps in `sums`
    steps: int = 0  # optimiser steps taken
    peaks: list[list[float]] = field(default_factory=list)  # learning rates at factor 1

    def __post_init__(self) -> None:
        self.peaks = [[g["lr"] for g in optimizer.param_groups] for optimizer in self.optimizers]


class LevelOptimizers:
    """All optimisers of a run.

    Args:
        model: the model; with a schedule, its `level_parameters()` names each level's parameters.
        config: optimiser, options, clipping.
        schedule: which level is slow or frozen and when it is due; None: everything steps every time.
        process_group: ranks that each hold the whole model, over which M3 and Muon divide their work.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimConfig,
        schedule: Schedule | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        self.config, self.schedule = config, schedule
        levels: dict[int, list[nn.Parameter]] = model.level_parameters() if schedule is not None else {}
        freeze(model, schedule)
        names = {parameter: name for name, parameter in model.named_parameters()}
        matrices = _hidden_matrices(model)
        taken: set[nn.Parameter] = set()
        self.groups: list[LevelGroup] = []
        for index in schedule.slow if schedule is not None else ():
            params = [p for p in levels.get(index, ()) if p.requires_grad]
            taken.update(params)
            if params:
                group = LevelGroup(
                    index,
                    [names[p] for p in params],
                    params,
                    make_optimizers(params, config, matrices, names, process_group),
                )
                group.sums = [torch.zeros_like(p) for p in params]
                self.groups.append(group)
        rest = [p for p in model.parameters() if p.requires_grad and p not in taken]
        if rest:
            self.groups.insert(
                0,
                LevelGroup(
                    None, [names[p] for p in rest], rest, make_optimizers(rest, config, matrices, names, process_group)
                ),
            )
        if not self.groups:
            raise ValueError("the model has no trainable parameter")

    def step(self, tokens_before: int, tokens_after: int, factor: float = 1.0) -> OptimizerStep:
        """Use the gradients in `.grad` and clear them.

        A step with a gradient that is not finite changes no weight and no average. A slow level whose boundary lies in
        (tokens_before, tokens_after] then steps with the mean gradient of its chunk.
        """
        params = [p for group in self.groups for p in group.params]
        norm = float(_norm([p.grad for p in params if p.grad is not None]))
        skipped = not math.isfinite(norm)
        due = set(self.schedule.due(tokens_before, tokens_after)) if self.schedule is not None else set()
        stepped = []
        for group in self.groups:
            if group.sums is None:
                if not skipped:
                    self._update(group, factor)
                continue
            if not skipped:
                for total, parameter in zip(group.sums, group.params):
                    if parameter.grad is not None:
                        total.add_(parameter.grad)
                group.count += 1
            if group.level in due and group.count:
                for total, parameter in zip(group.sums, group.params):
                    parameter.grad = total / group.count
                self._update(group, factor)
                for total in group.sums:
                    total.zero_()
                group.count = 0
                stepped.append(group.level)
        for parameter in params:
            parameter.grad = None
        return OptimizerStep(norm, skipped, tuple(stepped))

    def _update(self, group: LevelGroup, factor: float) -> None:
        if self.config.clip:
            nn.utils.clip_grad_norm_(group.params, self.config.clip)
        for optimizer, peaks in zip(group.optimizers, group.peaks):
            for part, peak in zip(optimizer.param_groups, peaks):
                part["lr"] = peak * factor
            optimizer.step()
        group.steps += 1

    def state_dict(self) -> dict:
        """Everything a resumed run needs, by group: optimiser states, gradient sums and counts."""
        return {
            "groups": [
                {
                    "level": group.level,
                    "names": group.names,
                    "optimizers": [optimizer.state_dict() for optimizer in group.optimizers],
                    "sums": group.sums,
                    "count": group.count,
                    "steps": group.steps,
                }
                for group in self.groups
            ]
        }

    def load_state_dict(self, state: dict) -> None:
        """Take over a saved state; ValueError if it belongs to other parameters or levels."""
        saved = state["groups"]
        if [(s["level"], s["names"]) for s in saved] != [(g.level, g.names) for g in self.groups]:
            raise ValueError("the optimiser state belongs to other parameters or levels than this model's")
        for group, values in zip(self.groups, saved):
            for optimizer, inner in zip(group.optimizers, values["optimizers"], strict=True):
                optimizer.load_state_dict(_as_held(inner, optimizer))
            if group.sums is not None:
                for total, value in zip(group.sums, values["sums"], strict=True):
                    total.copy_(sharded_as(value, total))
            group.count, group.steps = values["count"], values["steps"]


def _as_held(saved: dict, optimizer: torch.optim.Optimizer) -> dict:
    """A saved optimiser state, sharded where the optimiser keeps it sharded."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if getattr(optimizer, "whole_state", False) or not any(is_sharded(p) for p in params):
        return saved
    states = {}
    for i, values in saved["state"].items():
        states[i] = {
            name: sharded_as(value, params[i]) if getattr(value, "shape", None) == params[i].shape else value
            for name, value in values.items()
        }
    return {**saved, "state": states}


def make_optimizers(
    params: list[nn.Parameter],
    config: OptimConfig,
    matrices: set[nn.Parameter],
    names: dict[nn.Parameter, str],
    process_group: ProcessGroup | None = None,
) -> list[torch.optim.Optimizer]:
    """The optimisers for some parameters: vectors are not decayed; `matrices` take the step of Muon or M3, the rest
    AdamW's."""
    if config.name == "muon":
        hidden = [p for p in params if p in matrices]
        made = []
        if hidden:
            from nestling.training.muon import Muon

            options = {"adjust_lr_fn": "match_rms_adamw", **config.options}  # so that AdamW's learning rate fits
            muon: Any = _construct(Muon, "muon", _decay_groups(hidden, config), config, options)
            muon.process_group = process_group
            made.append(muon)
        rest = [p for p in params if p not in matrices]
        return made + ([_adamw(rest, config, {})] if rest else [])
    if config.name == "m3":
        from nestling.optim import M3

        hidden = [p for p in params if p in matrices]
        groups = [group | {"rule": "matrix"} for group in _decay_groups(hidden, config)]
        rest = _decay_groups([p for p in params if p not in matrices], config)
        groups += [group | {"rule": "adamw"} for group in rest]
        groups = [group | {"params": [(names[p], p) for p in group["params"]]} for group in groups]
        here, anywhere = " ".join(names[p] for p in params), " ".join(names.values())
        parts = config.options.get("split") or {}  # of other groups' matrices: not for this optimiser
        parts = {part: sizes for part, sizes in parts.items() if part in here or part not in anywhere}
        options = config.options | {"split": parts, "process_group": process_group}
        return [_construct(M3, "m3", groups, config, options)]
    if config.name == "adamw":
        return [_adamw(params, config, config.options)]
    return [_construct(_find_class(config.name), config.name, _decay_groups(params, config), config, config.options)]


def _adamw(params: list[nn.Parameter], config: OptimConfig, options: dict) -> torch.optim.Optimizer:
    return _construct(
        torch.optim.AdamW, "adamw", _decay_groups(params, config), config, {"betas": (0.9, 0.95), **options}
    )


def _decay_groups(params: list[nn.Parameter], config: OptimConfig) -> list[dict[str, Any]]:
    def decays(parameter: nn.Parameter) -> bool:
        return parameter.ndim >= 2 and not getattr(parameter, "_no_weight_decay", False)

    groups = [
        {"params": [p for p in params if decays(p)], "weight_decay": config.weight_decay},
        {"params": [p for p in params if not decays(p)], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _construct(cls: type, name: str, groups: list[dict], config: OptimConfig, options: dict) -> torch.optim.Optimizer:
    accepted = inspect.signature(cls.__init__).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        for option in options:
            if option not in accepted:
                raise ValueError(
                    unknown(
                        f"option of optimiser {name!r}", option, [n for n in accepted if n not in ("self", "params")]
                    )
                )
        if "weight_decay" not in accepted:
            groups = [{k: v for k, v in group.items() if k != "weight_decay"} for group in groups]
    arguments = {"lr": config.lr, **options}
    if "weight_decay" in accepted and "weight_decay" not in arguments:
        arguments["weight_decay"] = config.weight_decay
    try:
        return cls(groups, **arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimiser {name!r} refused its options {options}: {error}") from error


def _find_class(name: str) -> type:
    module, _, attribute = name.rpartition(".")
    if not module:
        raise ValueError(unknown("optimiser", name, [*BUILT_IN, "package.module.Class"]))
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"optimiser {name!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ValueError(f"optimiser {name!r} is not a torch.optim.Optimizer class")
    return found


def _hidden_matrices(model: nn.Module) -> set[nn.Parameter]:
    """Weights of linear layers, without the output head and whatever is tied to an embedding."""
    outside = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None:
        outside.add(head.weight)
    return {m.weight for m in model.modules() if isinstance(m, nn.Linear) and m.weight not in outside}


def _norm(gradients: list[Tensor]) -> Tensor:
    return whole(nn.utils.get_total_norm(gradients)) if gradients else torch.zeros(())
