"""The memories that optimisers keep of gradients: one for each of their kinds, over all the weights it serves."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from nestling.nested_system.describe import spec
from nestling.nested_system.formalism import AssociativeMemory, Cost, Solver, TensorSpec, Transfer
from nestling.nested_system.frequency import EVERY_STEP, NEVER, Frequency
from nestling.nested_system.reading.inventory import Inventory
from nestling.nested_system.reading.trainers import Trained, Training
from nestling.nested_system.rules import OptimizerMemory, Rule, like, scalar


@dataclass
class Draft:
    """One memory of an optimiser while it is put together."""

    name: str
    inner: OptimizerMemory
    frequency: Frequency
    tensors: list[TensorSpec] = field(default_factory=list)
    served: dict[str, None] = field(default_factory=dict)  # names of the weights' memories, in order
    waits_for: dict[str, None] = field(default_factory=dict)  # names of memories of the optimiser it takes in at once
    numbers: int = 0
    work: int = 0
    gradient_bytes: int = 0


def optimizer_memories(
    placed: list[AssociativeMemory], inventory: Inventory, training: Training
) -> tuple[list[Draft], list[Transfer]]:
    """The memories that optimisers keep of gradients, and who teaches whom there."""
    kept: dict[tuple, Draft] = {}
    taught: dict[tuple[str, str, str], Transfer] = {}
    for memory in placed:
        if memory.frequency in (None, NEVER) or memory.lifetime != "model":
            continue
        for tensor in memory.tensors:
            trained = training.parameters.get(tensor.name)
            if trained is None or tensor.shared_with is not None:
                continue
            serve = _Serving(
                kept, taught, training, memory.frequency, memory.name, tensor, inventory.tensors[tensor.name]
            )
            serve.all(trained)
    return list(kept.values()), list(taught.values())


@dataclass
class _Serving:
    """Adds one parameter to the memories of its optimiser."""

    kept: dict[tuple, Draft]
    taught: dict[tuple[str, str, str], Transfer]
    training: Training
    frequency: Frequency
    weights: str
    tensor: TensorSpec
    parameter: Any

    def all(self, trained: Trained) -> None:
        own = {inner.kind: self.add(trained, inner, self.frequency) for inner in trained.rule.memories}
        total = self.sum(trained)
        source = self.weights if total is None else total.name
        for inner in trained.rule.memories:
            name = own[inner.kind].name
            if inner.reads == "gradient":
                self.teach(source, name, "generation", "gradients" if total is None else "summed gradients")
            elif inner.reads == "weights":
                self.teach(self.weights, name, "generation", "weights")
            else:
                self.teach(own[inner.reads].name, name, "generation", f"the {inner.reads}")
                if inner.waits:
                    own[inner.kind].waits_for[own[inner.reads].name] = None
            if inner.feeds == "weights":
                self.teach(name, self.weights, "parametric", "the step it proposes")
            elif inner.feeds and trained_reads(trained.rule, inner.feeds) != inner.kind:
                self.teach(name, own[inner.feeds].name, "parametric", f"the {inner.kind}")
                own[inner.feeds].waits_for[name] = None
        if total is not None and not any(inner.reads == "gradient" for inner in trained.rule.memories):
            self.teach(source, self.weights, "parametric", "the summed gradient")

    def teach(self, source: str, target: str, kind: str, what: str) -> None:
        self.taught.setdefault((source, target, kind), Transfer(source, target, kind, what))

    def sum(self, trained: Trained) -> Draft | None:
        """The sum of gradients, where a step takes several."""
        times = self.training.accumulation
        slow = self.tensor.name in self.training.summed
        if times == 1 and not slow:
            return None
        inner = OptimizerMemory("gradient sum", "s ← s + g, emptied by the step", "−⟨s, g⟩, value-less", feeds="",
                                retrieval="s", states={".sum": like})  # fmt: skip
        total = self.add(trained, inner, EVERY_STEP.times(times), f" for {self.frequency}" if slow else "")
        self.teach(self.weights, total.name, "generation", "gradients")
        return total

    def add(self, trained: Trained, inner: OptimizerMemory, frequency: Frequency, suffix: str = "") -> Draft:
        key = (trained.optimizer, trained.rule.name, inner.kind, frequency, suffix)
        if key not in self.kept:
            twins = sum(1 for other in self.kept if other[1:3] == key[1:3])
            often = "" if frequency.unit == "step" else f" at {frequency}"
            name = f"{trained.rule.name}: {inner.kind}" + (suffix or often)
            name += f" ({twins + 1})" if name in {one.name for one in self.kept.values()} else ""
            self.kept[key] = Draft(name, inner, frequency)
        one = self.kept[key]
        made = []
        for state, shapes in inner.states.items():
            dtype = inner.dtype_of(state, self.parameter.dtype)
            counter = shapes is scalar or bool(inner.watch and state not in inner.watch)
            for shape in shapes(self.parameter):
                entry = spec(f"{self.tensor.name}.{state.lstrip('.')}", shape, dtype, "optimizer")
                made.append(replace(entry, counter=counter))
        one.tensors += made
        one.served[self.weights] = None
        one.numbers += self.tensor.numel
        one.work += 0 if inner.work is None else inner.work(self.parameter)
        one.gradient_bytes += self.tensor.bytes
        return one


def trained_reads(rule: Rule, kind: str) -> str:
    """What the rule's memory of this kind reads."""
    return next((inner.reads for inner in rule.memories if inner.kind == kind), "")


def finished(one: Draft) -> AssociativeMemory:
    inner = one.inner
    size = sum(t.bytes for t in one.tensors)
    context = {"gradient": "gradients", "weights": "weights"}.get(inner.reads, "momentum")
    needs = tuple(one.served) if inner.reads == "weights" and inner.waits else tuple(one.waits_for)
    return AssociativeMemory(
        one.name, inner.kind, inner.keys, inner.values, inner.objective, inner.retrieval or inner.kind[0], inner.update,
        Solver(inner.solver, inner.rule, steps=inner.steps), one.frequency.times(inner.rate), context,
        feasible="the shapes of the weights it serves", tensors=tuple(one.tensors), needs=needs, lifetime="training",
        cost=Cost(0, size, step_macs=inner.macs * one.numbers + one.work, step_bytes=2 * size + one.gradient_bytes),
        note=inner.note,
    )  # fmt: skip
