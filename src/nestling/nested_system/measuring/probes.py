"""Watching memories that learn inside a context: a layer is run token by token, and its state compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nestling.cms.blocks import ContinuumMemory
from nestling.cms.fast_linear import FastLinear
from nestling.cms.learning_model import LearningMixin
from nestling.cms.state import LevelState, begin_level
from nestling.layers.titans import SelfModifyingTitans
from nestling.nested_system.descriptions.continuum import level_kinds
from nestling.nested_system.descriptions.stacked import fast_weights
from nestling.nested_system.formalism import Measured

Probe = Callable[[Any, Tensor], dict[str, Measured]]
LONGEST = 256  # tokens that are run one by one


def probe(module: nn.Module) -> Probe | None:
    """The probe of a module; it gives what each of its memories did, by relative name."""
    if isinstance(module, LearningMixin):
        return learning
    return {SelfModifyingTitans: titans, ContinuumMemory: continuum}.get(type(module))


class _Count:
    """Changes of one memory's weights."""

    def __init__(self) -> None:
        self.last: list[Tensor] | None = None
        self.updates, self.norm = 0, 0.0

    def see(self, tensors: list[Tensor]) -> None:
        if self.last is not None:
            change = sum(float((a - b).square().sum()) for a, b in zip(tensors, self.last)) ** 0.5
            self.updates += change > 0
            self.norm += change
        self.last = [t.clone() for t in tensors]

    def measured(self, tokens: int) -> Measured:
        return Measured(self.updates, tokens, "token", self.norm / max(1, self.updates))


def titans(layer: SelfModifyingTitans, x: Tensor) -> dict[str, Measured]:
    """Counts of every memory and its momentum, over the first sequence of x [B, T, D]."""
    tokens = min(x.shape[1], LONGEST)
    counts: dict[str, _Count] = {}
    state = layer.initial_state(1)
    for t in range(-1, tokens):
        if t >= 0:
            _, state = layer(x[:1, t : t + 1], state)
        for group, fast in zip(layer.groups, state.memories):
            for i, name in enumerate(group.names):
                running = name == "memory" and layer.config.read != "chunk"
                read = fast.now if running else fast.start
                counts.setdefault(name, _Count()).see([w[:, i] for w in read])
                if fast.velocity:
                    counts.setdefault(f"{name}.momentum", _Count()).see([s[:, i] for s in fast.velocity])
    return {name: count.measured(tokens) for name, count in counts.items()}


@torch.no_grad()
def continuum(layer: ContinuumMemory, x: Tensor) -> dict[str, Measured]:
    """Levels that are to learn in the context: a layer without a state of theirs does not."""
    kinds = level_kinds(layer.levels, x.shape[1] + 1)
    taught = any(isinstance(m, FastLinear) for m in layer.modules())  # by the model around it
    if "fast" not in kinds or taught or layer(x[:1])[1]:
        return {}
    return {f"levels.{i}": Measured(0, x.shape[1], "token", 0.0) for i, kind in enumerate(kinds) if kind == "fast"}


@torch.no_grad()
def learning(model: LearningMixin, ids: Tensor) -> dict[str, Measured]:
    """Counts of every level over the first stream of ids [B, T], which is read a chunk at a time.

    One more token is read after the last, so that a chunk which ends there has all its targets.
    """
    learner, counts, cache = model.learner, {}, None
    if not model.reads:
        return {}
    found = fast_weights(learner, dict(model.named_modules()))
    members = enumerate(zip(learner.levels, learner.modules))
    size, fast = learner.chunk_size, learner.fast
    fresh = [begin_level(level, parts, 1, size) if i in fast else None for i, (level, parts) in members]

    def look(states: list[LevelState]) -> None:
        for (owner, index), parts in found.items():
            state, own = states[index], f"{owner.removesuffix(f'.blocks.{index}')}.levels.{index}"
            mine = [n for n, module in enumerate(learner.modules[index]) if any(module is p for p in parts.values())]
            held = {own: state.deltas} | ({f"{own}.sum": state.sums} if state.sums else {})
            held |= {f"{own}.{_SLOTS[slot]}": tensors for slot, tensors in state.slots.items() if slot in _SLOTS}
            for name, tensors in held.items():
                counts.setdefault(name, _Count()).see([tensors[n] for n in mine])

    look(fresh)
    for chunk in torch.cat([ids[:1], ids[:1, :1]], 1).split(learner.chunk_size, 1):
        cache = model(input_ids=chunk, past_key_values=cache, use_cache=True).past_key_values
        look([state or empty for state, empty in zip(cache.levels.levels, fresh)])
    return {name: count.measured(ids.shape[1]) for name, count in counts.items()}


_SLOTS = {"momentum": "momentum", "first": "first moment", "second": "second moment", "slow": "slow moment",
          "direction": "slow direction"}  # fmt: skip
