"""Every tensor of a copied model and its optimisers, compared after each step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nestling.nested_system.formalism import AssociativeMemory, Measured, TensorSpec
from nestling.nested_system.measuring.copying import Copies
from nestling.nested_system.measuring.probes import probe
from nestling.nested_system.reading.inventory import Inventory, unwrap
from nestling.nested_system.system import NestedSystem


class Watch:
    """The tensors of every memory on the copy, what they were, and how often they changed."""

    def __init__(self, system: NestedSystem, twin: Copies) -> None:
        self.system, self.twin = system, twin
        self.inventory = Inventory(twin.model)
        self.last: dict[tuple[str, str], Tensor] = {}
        self.moved: dict[tuple[str, str], int] = {}  # memory, tensor: times it changed
        self.updates: dict[str, int] = {}
        self.norms: dict[str, float] = {}
        self.gradients: dict[int, bool] = {}
        self.backwards = 0
        for memory in self._of(sums=False):
            self._look(memory, count=False)

    def _of(self, *, sums: bool) -> Iterator[AssociativeMemory]:
        for memory in self.system.memories:
            if memory.lifetime != "context" and (memory.kind == "gradient sum") == sums:
                yield memory

    def find(self, memory: AssociativeMemory, tensor: TensorSpec) -> Tensor | None:
        """The live tensor of a name; None where there is none yet."""
        if tensor.role in ("parameter", "buffer"):
            return self.inventory.tensors.get(tensor.shared_with or tensor.name)
        if tensor.name.startswith("average.") and memory.kind == "average of weights":
            inner, _ = unwrap(self.twin.average.module)
            return dict(inner.named_parameters()).get(tensor.name.removeprefix("average."))
        parameter, _, state = tensor.name.rpartition(".")
        found = self.inventory.tensors.get(parameter)
        for optimizer in self.twin.optimizers:
            groups = [None] if isinstance(optimizer, torch.optim.Optimizer) else optimizer.groups
            for group in groups:
                if state == "sum":
                    if group is not None and group.sums is not None and any(p is found for p in group.params):
                        return group.sums[next(i for i, p in enumerate(group.params) if p is found)]
                    continue
                for one in [optimizer] if group is None else group.optimizers:
                    value = one.state.get(found, {}).get(state) if found is not None else None
                    if isinstance(value, Tensor):
                        return value
        return found.grad if state == "sum" and found is not None else None

    def _look(self, memory: AssociativeMemory, *, count: bool = True) -> None:
        changed, square = False, 0.0
        for tensor in memory.tensors:
            live = None if tensor.counter else self.find(memory, tensor)
            if live is None:
                continue
            key = (memory.name, tensor.name)
            now, before = live.detach().clone(), self.last.get(key)
            self.last[key] = now
            if not count:
                continue
            before = torch.zeros_like(now) if before is None else before
            if not torch.equal(now, before):
                changed = True
                self.moved[key] = self.moved.get(key, 0) + 1
                square += float((now.double() - before.double()).square().sum()) if now.is_floating_point() else 0.0
        if changed:
            self.updates[memory.name] = self.updates.get(memory.name, 0) + 1
            self.norms[memory.name] = self.norms.get(memory.name, 0.0) + math.sqrt(square)

    def after_backward(self) -> None:
        self.backwards += 1
        for memory in self._of(sums=True):
            if memory.frequency.rate > 1:  # sums over the backward passes of one step
                self._look(memory)

    def after_step(self) -> None:
        for memory in self._of(sums=False):
            self._look(memory)
        for memory in self._of(sums=True):
            if memory.frequency.rate <= 1:
                self._look(memory)
            else:
                for tensor in memory.tensors:
                    self.last.pop((memory.name, tensor.name), None)

    def inputs(self) -> dict[str, Any]:
        """Hooks that keep the first input of every module with a probe."""
        found: dict[str, Any] = {"handles": []}
        for name, module in self.inventory.modules.items():
            if probe(module) is not None:

                def keep(_: nn.Module, args: tuple, named: dict, name: str = name) -> None:
                    first = args[0] if args else named.get("input_ids")
                    found.setdefault(name, first.detach() if isinstance(first, Tensor) else None)

                found["handles"].append(module.register_forward_pre_hook(keep, with_kwargs=True))
        return found

    def probe(self, inputs: dict[str, Any]) -> dict[str, Measured]:
        """What the memories inside a context did."""
        found: dict[str, Measured] = {}
        with torch.no_grad():
            for name, x in inputs.items():
                if x is not None:
                    for relative, result in probe(self.inventory.modules[name])(
                        self.inventory.modules[name], x
                    ).items():
                        found[".".join(p for p in (name, relative) if p) or relative] = result
        return found
