"""Reading a model with its optimiser as a nested system."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from nestling.nested_system import descriptions  # noqa: F401 - registers the known descriptions
from nestling.nested_system.formalism import AssociativeMemory, Solver, Transfer
from nestling.nested_system.reading.assemble import assemble
from nestling.nested_system.reading.describe import Place, description_of
from nestling.nested_system.reading.inventory import Inventory
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
        from nestling.nested_system.measuring.measure import measured, tokens_of

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


def read_modules(inventory: Inventory) -> tuple[list[AssociativeMemory], list[Transfer], list[str]]:
    """Every module's description; what none describes becomes an unknown memory, or a note if it holds nothing."""
    memories: list[AssociativeMemory] = []
    transfers: list[Transfer] = []
    opaque: dict[str, int] = {}
    for name, module in inventory.modules.items():
        if inventory.spoken_for(name):
            continue
        place = Place(name, module, inventory)
        description = description_of(module)
        if description is None:
            if not module._parameters and not module._buffers:
                opaque[type(module).__name__] = opaque.get(type(module).__name__, 0) + 1
            continue
        for part in _parts(description(module, place), module):
            (transfers if isinstance(part, Transfer) else memories).append(part)
    for path, names in inventory.unclaimed():
        memories.append(_unknown(inventory, path, names))
    return memories, transfers, _notes(inventory, opaque)


def _parts(parts: Any, module: nn.Module) -> Iterable[AssociativeMemory | Transfer]:
    kind = type(module).__name__
    if not isinstance(parts, Iterable):
        raise TypeError(f"the description of {kind} must yield memories and transfers; it returned {parts!r:.60}")
    for part in parts:
        if not isinstance(part, (AssociativeMemory, Transfer)):
            raise TypeError(f"the description of {kind} yielded {part!r:.60}, which is no memory or transfer")
        yield part


def _unknown(inventory: Inventory, path: str, names: Sequence[str]) -> AssociativeMemory:
    """What a module without a description holds."""
    module = inventory.modules[path]
    place = Place(path, module, inventory)
    memory = place.weights("unknown", retrieval="?", macs=0, keys="?", values="?", objective="?")
    kept = tuple(t for t in memory.tensors if t.name in names)
    label = memory.name if len(kept) == len(memory.tensors) else f"{memory.name} (rest)"
    own = [t for t in kept if t.shared_with is None]
    counts = dict(parameters=sum(t.numel for t in own if t.role == "parameter"), state_bytes=sum(t.bytes for t in own))
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    note = f"{kind} has no description: see nestling.nested_system.describes"
    if any(t.name.endswith("_flat_param") for t in kept):
        note = "all weights are one flat parameter: wrap with use_orig_params=True, or fully_shard, to tell them apart"
    cost = replace(memory.cost, **counts, read_bytes=0)
    return replace(memory, name=label, tensors=kept, solver=Solver("unknown"), cost=cost, note=note)


def _notes(inventory: Inventory, opaque: dict[str, int]) -> list[str]:
    notes = [f"read through {name}" for name in sorted(inventory.wrappers)]
    if opaque:
        kinds = ", ".join(f"{kind} ×{count}" if count > 1 else kind for kind, count in opaque.items())
        notes.append(f"read by their parts (a memory in their own code would not be seen): {kinds}")
    notes += [f"{second} is the module {first or 'itself'} again" for second, first in inventory.repeated]
    return notes
