"""From descriptions to a nested system: frequencies, the optimisers' memories, order, coverage."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from nestling.nested_system.describe import spec
from nestling.nested_system.formalism import AssociativeMemory, ContextFlow, Cost, Solver, TensorSpec, Transfer
from nestling.nested_system.frequency import EVERY_STEP, NEVER, Frequency
from nestling.nested_system.reading.inventory import Inventory, unwrap
from nestling.nested_system.reading.optimizer_memories import Draft, finished, optimizer_memories
from nestling.nested_system.reading.order import order
from nestling.nested_system.reading.trainers import Trained, Training
from nestling.nested_system.rules import Rule
from nestling.nested_system.system import Coverage, Finding, NestedSystem

FLOWS = {
    "training data": (
        "inputs of a layer and its local errors, one pair for each token",
        "the data, through the layers below and the loss above",
    ),
    "sequence": ("keys and values of one sequence's tokens", "the tokens, through the projections"),
    "surprise in context": ("gradients of an in-context memory's own objective", "that memory"),
    "gradients": (
        "gradients of the weights, one for each backward pass",
        "the architecture, by backpropagation (NL Sec. 3.3)",
    ),
    "momentum": ("what another memory of the optimiser holds", "the optimiser"),
    "weights": ("the weights after each step", "the optimiser's steps"),
}


def assemble(
    inventory: Inventory,
    training: Training,
    memories: list[AssociativeMemory],
    transfers: list[Transfer],
    notes: list[str],
    average: nn.Module | None,
    tokens_per_step: int | None,
) -> NestedSystem:
    """The ordered system of what the modules are and who trains them."""
    names = [memory.name for memory in memories]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two memories are named {', '.join(twice)}: a description must name each of its memories")
    renamed: dict[str, list[str]] = {}
    placed: list[AssociativeMemory] = []
    for memory in memories:
        parts = [memory] if memory.frequency is not None else _by_frequency(memory, inventory, training)
        renamed[memory.name] = [part.name for part in parts]
        placed += parts
    transfers = [
        replace(t, source=s, target=e)
        for t in transfers
        for s in _ends(t, t.source, renamed)
        for e in _ends(t, t.target, renamed)
    ]
    kept, taught = optimizer_memories(placed, inventory, training)
    placed = [_needing(memory, kept) for memory in placed] + [finished(one) for one in kept]
    placed += _averages(average, placed, inventory)
    if average is not None:
        taught += [Transfer(m, placed[-1].name, "generation", "weights") for m in placed[-1].needs]
    levels = order(placed, tokens_per_step)
    used = {memory.context for memory in placed}
    name = type(inventory.root).__name__ + (f" + {training.name}" if training.optimizers else "")
    return NestedSystem(
        name, levels, tuple(ContextFlow(n, *FLOWS[n]) for n in FLOWS if n in used), (*transfers, *taught),
        coverage_of(placed, inventory, training), tuple(_findings(placed, inventory, training)),
        (*notes, *_training_notes(training)), tokens_per_step, inventory.context_length,
    )  # fmt: skip


def _ends(transfer: Transfer, name: str, renamed: dict[str, list[str]]) -> list[str]:
    if name not in renamed:
        raise ValueError(f"a description hands knowledge {transfer}, but there is no memory {name!r}")
    return renamed[name]


def _by_frequency(memory: AssociativeMemory, inventory: Inventory, training: Training) -> list[AssociativeMemory]:
    """Weights whose tensors are updated at different frequencies, as one memory for each."""
    groups: dict[Frequency, list[TensorSpec]] = defaultdict(list)
    rules: dict[Frequency, dict[tuple[str, str], tuple[Rule, int]]] = defaultdict(dict)
    for tensor in memory.tensors:
        trained = training.parameters.get(tensor.shared_with or tensor.name)
        frequency = _frequency(tensor, trained, inventory)
        groups[frequency].append(tensor)
        if trained is not None and frequency != NEVER:
            count = 0 if tensor.shared_with is not None else tensor.numel
            key = (trained.rule.name, trained.rule.update)
            rules[frequency][key] = (trained.rule, rules[frequency].get(key, (None, 0))[1] + count)
    if memory.unknown and len(groups) > 1:  # nothing is known of its parts: as fast as the fastest of them
        fastest = max(groups, key=lambda frequency: frequency.per_token(1))
        groups = {fastest: list(memory.tensors)}
    if not groups:
        groups[NEVER] = []
    total = sum(t.bytes for t in memory.tensors) or 1
    made = []
    for frequency, tensors in groups.items():
        share = sum(t.bytes for t in tensors) / total
        part = memory if len(groups) == 1 else _share(memory, tensors, share, frequency)
        if inventory.is_initial_state(memory.name):
            part = replace(part, kind="initial state", cost=replace(part.cost, read_macs=0, write_macs=0, read_bytes=0))
        made.append(_solved(part, frequency, list(rules[frequency].values()), training))
    return made


def _frequency(tensor: TensorSpec, trained: Trained | None, inventory: Inventory) -> Frequency:
    if trained is None:
        return NEVER
    return inventory.frequency_of(tensor.name) or trained.frequency


def _share(
    memory: AssociativeMemory, tensors: list[TensorSpec], share: float, frequency: Frequency
) -> AssociativeMemory:
    """A memory cut to some of its tensors, with their part of its costs."""
    own = [t for t in tensors if t.shared_with is None]
    last = ", ".join(t.name.rpartition(".")[2] for t in tensors)
    cost = Cost(
        sum(t.numel for t in own if t.role == "parameter"),
        sum(t.bytes for t in own),
        *(round(part * share) for part in (memory.cost.read_macs, memory.cost.read_bytes, memory.cost.write_macs)),
    )
    return replace(memory, name=f"{memory.name} [{last}]", tensors=tuple(tensors), cost=cost)


def _solved(
    memory: AssociativeMemory, frequency: Frequency, rules: list[tuple[Rule, int]], training: Training
) -> AssociativeMemory:
    if frequency == NEVER:
        solver = memory.solver if memory.unknown else Solver("none")
        cost = replace(memory.cost, write_macs=0)
        return replace(memory, frequency=NEVER, solver=solver, update="never", cost=cost)
    rules = sorted(
        rules, key=lambda pair: -pair[1]
    )  # the rule of most numbers comes first, and stands for all of its name
    named = {rule.name: rule for rule, _ in reversed(rules)}
    names = list(dict.fromkeys(rule.name for rule, _ in rules))
    size = sum(t.bytes for t in memory.tensors if t.shared_with is None)
    by = " × ".join(filter(None, [rules[0][0].rate, *training.schedulers]))
    cost = replace(memory.cost, step_macs=sum(r.macs * n for r, n in rules), step_bytes=3 * size)
    solver = memory.solver if memory.unknown else Solver("gradient", " and ".join(names), by)
    objective = rules[0][0].objective or memory.objective
    update = "; ".join(dict.fromkeys(named[name].update for name in names))
    return replace(memory, frequency=frequency, update=update, solver=solver, cost=cost, objective=objective)


def _needing(memory: AssociativeMemory, kept: list[Draft]) -> AssociativeMemory:
    """The weights with the optimiser's memories whose state at t they need."""
    needs = tuple(o.name for o in kept if memory.name in o.served and o.inner.reads != "weights" and o.inner.waits)
    return replace(memory, needs=(*memory.needs, *needs)) if needs else memory


def _averages(
    average: nn.Module | None, placed: list[AssociativeMemory], inventory: Inventory
) -> list[AssociativeMemory]:
    """A running average of the weights, as a memory of them."""
    if average is None:
        return []
    inner, _ = unwrap(average.module)
    theirs, ours = [tuple(p.shape) for p in inner.parameters()], [tuple(p.shape) for p in inventory.root.parameters()]
    if theirs != ours:
        raise ValueError("average holds parameters of other shapes than the model's: make it with AveragedModel(model)")
    weights = tuple(
        m.name
        for m in placed
        if m.frequency != NEVER and m.lifetime == "model" and any(t.role == "parameter" for t in m.tensors)
    )
    tensors = tuple(spec(f"average.{n}", p.shape, p.dtype, "optimizer") for n, p in inner.named_parameters())
    size, count = sum(t.bytes for t in tensors), sum(t.numel for t in tensors)
    return [
        AssociativeMemory(
            "average of weights",
            "average of weights",
            "—",
            "W, the weights after each step",
            "½ |a − W|²",
            "W̄, used in W's place",
            "a ← a + (1 − β)(W − a)",
            Solver("gradient", "gradient descent, one step"),
            EVERY_STEP,
            "weights",
            "the shapes of the weights",
            tensors,
            weights,
            "model",
            Cost(0, size, step_macs=count, step_bytes=3 * size),
            note="updated once for each call of update_parameters",
        )
    ]


def coverage_of(placed: Sequence[AssociativeMemory], inventory: Inventory, training: Training) -> Coverage:
    described = {t.name for m in placed if not m.unknown for t in m.tensors if t.role in ("parameter", "buffer")}
    unknown = [f"{m.name}: {m.note}" if m.note else m.name for m in placed if m.unknown]
    counts = {}
    for role, names in (("parameters", _names(inventory, True)), ("buffers", _names(inventory, False))):
        counts[role] = (sum(name in described for name in names), len(names))
    states = total = 0
    for index, optimizer in enumerate(training.optimizers):
        for parameter, values in optimizer.state.items():
            trained = training.parameters.get(inventory.name_of(parameter) or "")
            if trained is None or trained.optimizer != index:
                continue
            known = {n for inner in trained.rule.memories if inner.kind != "unknown" for n in inner.states}
            total += len(values)
            states += sum(name in known for name in values)
            unknown += [f"{type(optimizer).__name__} state {name!r}" for name in values if name not in known]
    if not total:  # before the first step: what the rules say there will be
        states = total = sum(1 for m in placed if m.lifetime == "training" for t in m.tensors if t.role == "optimizer")
    return Coverage(counts["parameters"], counts["buffers"], (states, total), tuple(dict.fromkeys(unknown)))


def _names(inventory: Inventory, parameters: bool) -> list[str]:
    return [name for name, tensor in inventory.tensors.items() if isinstance(tensor, nn.Parameter) == parameters]


def _findings(placed: list[AssociativeMemory], inventory: Inventory, training: Training) -> list[Finding]:
    found = []
    for memory in placed:
        if memory.unknown:
            found.append(Finding("unknown", memory.name, memory.note or "nothing is known of it but its tensors"))
        for tensor in memory.tensors:
            if tensor.shared_with is not None:
                found.append(Finding("shared", memory.name, f"{tensor.name} is {tensor.shared_with}, counted there"))
        if memory.lifetime == "training" and memory.cost.state_bytes:
            message = (
                f"{memory.cost.state_bytes:,} bytes learned from gradients are dropped when training ends (NL Sec. 4.5)"
            )
            found.append(Finding("dropped", memory.name, message))
    left: dict[str, list[str]] = defaultdict(list)
    for name, tensor in inventory.tensors.items() if training.optimizers else ():
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad and name not in training.parameters:
            owner = next((m.name for m in placed if any(t.name == name for t in m.tensors)), name)
            left[owner].append(name.removeprefix(f"{owner}."))
    for owner, names in left.items():
        found.append(Finding("never moves", owner, f"{', '.join(names)} could be trained, but no optimiser has it"))
    return found


def _training_notes(training: Training) -> list[str]:
    notes = [f"an optimiser also trains {count:,} numbers of another model" for count in training.foreign]
    if "ReduceLROnPlateau" in training.schedulers:
        notes.append("ReduceLROnPlateau also remembers the best loss it was given; when that happens is not known here")
    return notes
