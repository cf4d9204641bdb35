"""What every module of a model is as memories, by its description."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from nestling.nested_system import descriptions  # noqa: F401 - registers the known descriptions
from nestling.nested_system.describe import Place, description_of
from nestling.nested_system.formalism import AssociativeMemory, Solver, Transfer
from nestling.nested_system.reading.inventory import Inventory


def read_modules(inventory: Inventory) -> tuple[list[AssociativeMemory], list[Transfer], list[str]]:
    """Every module's description; what none describes becomes an unknown memory, or a note if it holds nothing."""
    memories: list[AssociativeMemory] = []
    transfers: list[Transfer] = []
    opaque: dict[str, int] = {}
    for name, module in inventory.modules.items():
        if inventory.is_consumed(name):
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
