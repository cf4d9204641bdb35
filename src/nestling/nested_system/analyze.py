"""`nestling.levels`: a model with its optimiser as a nested system, read and on request measured."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nestling.nested_system.measuring.measure import measured, tokens_of
from nestling.nested_system.reading.assemble import assemble
from nestling.nested_system.reading.inventory import Inventory
from nestling.nested_system.reading.modules import read_modules
from nestling.nested_system.reading.trainers import training_of
from nestling.nested_system.system import NestedSystem


def levels(
    model: nn.Module,
    optimizer: Any = None,
    *,
    scheduler: Any = None,
    average: nn.Module | None = None,
    accumulation: int = 1,
    tokens_per_step: int | None = None,
    context_length: int | None = None,
    measure: Any = None,
    steps: int = 3,
    loss: Any = None,
) -> NestedSystem:
    """The nested system of a model with its optimiser: which memories there are, what each compresses, how often each
    is updated, who teaches whom, and what each costs (NL Defs. 1-4).

    Nothing of the model, the optimiser or the random numbers is changed.

    Args:
        model: any module, on any device (the meta device too); compiled and wrapped modules are looked through.
        optimizer: a torch optimiser, several, or a run's `LevelOptimizers`. None shows what can still learn when
            nothing trains the weights: a deployed model.
        scheduler: learning-rate scheduler, or several.
        average: a `torch.optim.swa_utils.AveragedModel` that follows the model.
        accumulation: backward passes whose gradients one step sums.
        tokens_per_step: tokens of one outer step; needed to compare levels of the continuum memory that are slower
            than a step with it, and for costs per token of what is done once a step.
        context_length: tokens of a sequence, for costs that grow with it. None: the model's own limit, else 1,024.
        measure: a batch (a tensor, a tuple, or a dict of arguments of the model): run a few steps on a copy, count what
            changes, and compare it with what was declared.
        steps: how many.
        loss: `loss(output, batch)`; None takes the output's own `loss`, or half its mean square.

    Raises:
        TypeError, ValueError: something that is no module, optimiser, scheduler or average of this model; a batch to
            measure with on the meta device.
    """
    _check(model, average, accumulation, tokens_per_step, context_length)
    if measure is not None:
        tokens_per_step = tokens_per_step or tokens_of(measure) * accumulation
    inventory = Inventory(model, context_length or _context_length(model))
    training = training_of(optimizer, scheduler, accumulation, inventory)
    memories, transfers, notes = read_modules(inventory)
    if not memories:
        raise ValueError(
            f"{type(inventory.root).__name__} holds nothing: no parameter, no buffer, no memory that is known"
        )
    system = assemble(inventory, training, memories, transfers, notes, average, tokens_per_step)
    if measure is None:
        return system
    return measured(
        system, model, optimizer, measure, scheduler=scheduler, average=average, accumulation=accumulation, steps=steps,
        loss=loss,
    )  # fmt: skip


def _check(model: Any, average: Any, accumulation: Any, tokens_per_step: Any, context_length: Any) -> None:
    if not isinstance(model, nn.Module):
        hint = " (give an instance, not the class)" if isinstance(model, type) else ""
        raise TypeError(f"model must be a torch.nn.Module; got {model!r:.80}{hint}")
    if average is not None and not isinstance(average, torch.optim.swa_utils.AveragedModel):
        raise TypeError(f"average must be a torch.optim.swa_utils.AveragedModel; got {type(average).__name__}")
    counts = dict(accumulation=accumulation, tokens_per_step=tokens_per_step, context_length=context_length)
    for name, value in counts.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")


def _context_length(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    for name in ("context_length", "max_position_embeddings", "n_positions"):
        if isinstance(size := getattr(config, name, None), int):
            return size
    image, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if isinstance(image, int) and isinstance(patch, int):
        return (image // patch) ** 2 + 1  # patches, and the class token
    return 1024
