"""What really moves: a few steps on a copy, every tensor watched, compared with what was declared."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nestling.nested_system.formalism import AssociativeMemory, Measured
from nestling.nested_system.frequency import NEVER
from nestling.nested_system.measuring.copying import Copies, copies, same_random_numbers
from nestling.nested_system.measuring.watch import Watch
from nestling.nested_system.reading.assemble import coverage_of
from nestling.nested_system.reading.inventory import unwrap
from nestling.nested_system.reading.trainers import training_of
from nestling.nested_system.system import Finding, NestedLevel, NestedSystem


def tokens_of(batch: Any) -> int:
    """Data points of a batch: tokens of ids [B, T] or features [B, T, D], samples of anything else."""
    if isinstance(batch, dict):
        for name in ("input_ids", "inputs_embeds"):
            if isinstance(batch.get(name), Tensor):
                return batch[name].shape[:2].numel()
        batch = next((v for v in batch.values() if isinstance(v, Tensor)), None)
    if isinstance(batch, (tuple, list)):
        batch = next((v for v in batch if isinstance(v, Tensor)), None)
    if not isinstance(batch, Tensor) or batch.ndim == 0:
        raise TypeError("measure must be a batch: a tensor, a tuple of a model's arguments, or a dict of them by name")
    sequence = batch.ndim == 3 or (batch.ndim == 2 and not batch.is_floating_point())
    return batch.shape[:2].numel() if sequence else batch.shape[0]


def measured(
    system: NestedSystem,
    model: nn.Module,
    optimizer: Any,
    batch: Any,
    *,
    scheduler: Any = None,
    average: nn.Module | None = None,
    accumulation: int = 1,
    steps: int = 3,
    loss: Callable[[Any, Any], Tensor] | None = None,
) -> NestedSystem:
    """The system with what a few steps did to each memory, and findings where that is not what was declared.

    Raises:
        ValueError: no steps, a model on the meta device, a model that cannot be copied, a loss that is not finite.
        TypeError: a batch or an output there is nothing to learn from.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1; got {steps!r}")
    root, _ = unwrap(model)
    if any(t.is_meta for t in [*root.parameters(), *root.buffers()]):
        raise ValueError("measure needs values, and a model on the meta device has none: build it on a real device")
    several = [[] if v is None else list(v) if isinstance(v, (list, tuple)) else [v] for v in (optimizer, scheduler)]
    with same_random_numbers(), warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        twin = copies(root, several[0], several[1], average)
        watch = Watch(system, twin)
        inputs = watch.inputs()
        run = _Run(twin, batch, loss, accumulation, tokens_of(batch) * accumulation)
        for _ in range(steps):
            run.step(watch)
        run.close(inputs)
        probed = watch.probe(inputs)
    # after a few steps the optimisers have their states: what they really keep, known or not
    training = training_of(twin.optimizers, None, accumulation, watch.inventory)
    found = coverage_of(system.memories, watch.inventory, training)
    fresh = [Finding("unknown", text.split(" state ")[0], f"{text} is kept, and has no description")
             for text in found.unknown if text not in system.coverage.unknown]  # fmt: skip
    system = replace(system, coverage=found, findings=(*system.findings, *fresh))
    return _report(system, watch, probed, steps, tokens_of(batch) * accumulation, bool(several[0]), run.notes)


class _Run:
    """Steps of a training like the user's."""

    def __init__(self, twin: Copies, batch: Any, loss: Any, accumulation: int, tokens: int) -> None:
        self.twin, self.loss, self.accumulation, self.tokens, self.seen = twin, loss, accumulation, tokens, 0
        self.args, self.kwargs, self.notes = _arguments(twin.model, batch)
        self.batch = batch

    def backward(self) -> Tensor:
        output = self.twin.model(*self.args, **self.kwargs)
        value, note = (self.loss(output, self.batch), "") if self.loss is not None else _loss(output)
        if note and note not in self.notes:
            self.notes.append(note)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise TypeError(f"the loss must be one number in a tensor; got {value!r:.80}")
        if not math.isfinite(value):
            raise ValueError(f"the loss of the batch is {value.item()}: nothing can be measured with it")
        if value.requires_grad:
            value.backward()
        return value

    def step(self, watch: Watch) -> None:
        for _ in range(self.accumulation):
            self.backward()
            watch.after_backward()
        gradients = {id(p): p.grad is not None and bool(p.grad.any()) for p in self.twin.model.parameters()}
        watch.gradients = (
            gradients if not watch.gradients else {k: v or watch.gradients.get(k, False) for k, v in gradients.items()}
        )
        for optimizer in self.twin.optimizers:
            if not isinstance(optimizer, torch.optim.Optimizer):
                optimizer.step(self.seen, self.seen + self.tokens)
            elif _needs_closure(optimizer):
                optimizer.step(self._closure)
            else:
                optimizer.step()
        self.seen += self.tokens
        for scheduler in self.twin.schedulers:
            scheduler.step(*([0.0] if type(scheduler).__name__ == "ReduceLROnPlateau" else []))
        if self.twin.average is not None:
            self.twin.average.update_parameters(self.twin.model)
        watch.after_step()
        for parameter in self.twin.model.parameters():
            parameter.grad = None

    def _closure(self) -> Tensor:
        for parameter in self.twin.model.parameters():
            parameter.grad = None
        return self.backward()

    def close(self, inputs: dict) -> None:
        for handle in inputs.pop("handles"):
            handle.remove()


def _needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def _arguments(model: nn.Module, batch: Any) -> tuple[tuple, dict, list[str]]:
    """How the model is called; a causal language model gets its input as labels if it has none."""
    causal = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    if isinstance(batch, Tensor) and causal and not batch.is_floating_point():
        batch = {"input_ids": batch}
    if isinstance(batch, dict):
        if causal and "labels" not in batch and "input_ids" in batch:
            return (), {**batch, "labels": batch["input_ids"]}, ["measured with the next-token loss of the batch"]
        return (), dict(batch), []
    return (tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)), {}, []


def _loss(output: Any) -> tuple[Tensor, str]:
    own = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if isinstance(own, Tensor):
        return own, ""
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else [output]
    tensor = next((v for v in values if isinstance(v, Tensor) and v.is_floating_point()), None)
    if tensor is None:
        raise TypeError(f"the model's output ({type(output).__name__}) holds no loss and no tensor: give loss=")
    if tensor.ndim == 0:
        return tensor, ""
    return (
        0.5 * tensor.float().square().mean(),
        "measured with half the mean square of the output as loss; loss= sets another",
    )


def _report(
    system: NestedSystem,
    watch: Watch,
    probed: dict[str, Measured],
    steps: int,
    tokens: int,
    trained: bool,
    notes: list[str],
) -> NestedSystem:
    levels, findings = [], list(system.findings)
    for level in system.levels:
        memories = []
        for memory in level.memories:
            seen = probed.get(memory.name) or _seen(memory, watch, steps)
            memories.append(replace(memory, measured=seen))
            if seen is not None:
                findings += _judge(memory, seen, watch, tokens)
        levels.append(NestedLevel(level.index, level.frequency, tuple(memories)))
    how = f"measured over {steps} step{'s' * (steps != 1)} of {tokens:,} tokens" + (
        "" if trained else " without an optimiser"
    )
    return replace(
        system, levels=tuple(levels), findings=tuple(dict.fromkeys(findings)), notes=(*system.notes, how, *notes)
    )


def _seen(memory: AssociativeMemory, watch: Watch, steps: int) -> Measured | None:
    if not any(key[0] == memory.name for key in watch.last) and memory.kind != "gradient sum":
        return None
    updates = watch.updates.get(memory.name, 0)
    over = watch.backwards if memory.kind == "gradient sum" and memory.frequency.rate > 1 else steps
    return Measured(updates, over, "step", watch.norms.get(memory.name, 0.0) / max(1, updates))


def _judge(memory: AssociativeMemory, seen: Measured, watch: Watch, tokens: int) -> Iterator[Finding]:
    """What a memory did that was not declared of it."""
    if memory.frequency == NEVER:
        if seen.updates:
            yield Finding("moves though frozen", memory.name, f"changed in {seen}, but nothing is said to train it")
        return
    per = 1 if seen.unit == "token" else tokens
    rate = memory.frequency.rate if memory.frequency.unit == "step" else memory.frequency.rate * per
    expected = seen.over * min(rate, 1)  # several updates inside a step are seen as one
    if memory.kind == "gradient sum":
        expected = seen.over
    if seen.updates == 0 and expected >= 1:
        yield Finding(
            "never moves",
            memory.name,
            f"declared {memory.frequency}, but it never changed in {seen.over} {seen.unit}s{_why(memory, watch)}",
        )
    elif abs(seen.updates - expected) >= 1:
        yield Finding(
            "another rate",
            memory.name,
            f"declared {memory.frequency}, measured {seen.updates} updates in {seen.over} {seen.unit}s",
        )
    elif seen.updates:
        still = [
            t.name
            for t in memory.tensors
            if not t.counter
            and (memory.name, t.name) in watch.last
            and (memory.name, t.name) not in watch.moved
            and t.role == "parameter"
        ]
        if still:
            yield Finding("never moves", memory.name, f"{', '.join(still)} never changed while the rest did")


def _why(memory: AssociativeMemory, watch: Watch) -> str:
    live = [watch.inventory.tensors.get(t.shared_with or t.name) for t in memory.tensors if t.role == "parameter"]
    live = [p for p in live if p is not None]
    if live and not any(watch.gradients.get(id(p), False) for p in live):
        return ": no gradient reaches it"
    return ""
