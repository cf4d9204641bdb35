"""Models with stacked levels: differences of every stream's own on top of shared weights (NL Eq. 71, Sec. 7.3)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from torch import nn

from nestling.cms.fast_linear import FastLinear
from nestling.cms.learner import Learner
from nestling.cms.stack import AddedBlock, Chain
from nestling.cms.stacked_model import StackedForCausalLM
from nestling.nested_system.describe import Place, describes, description_of, transparent
from nestling.nested_system.descriptions.continuum import in_context_level, learned, level_block, reads
from nestling.nested_system.descriptions.huggingface import mlp
from nestling.nested_system.descriptions.torch_modules import Parts
from nestling.nested_system.formalism import Transfer
from nestling.nested_system.frequency import NEVER, Frequency

describes(Chain)(transparent)


@describes(AddedBlock)
def added_block(module: AddedBlock, place: Place) -> Parts:
    """The block of a level that was added after an MLP."""
    macs = sum(p.numel() for p in module.parameters())
    yield place.weights("MLP block", None, retrieval="y = x + W₁ σ(W₂ x)", macs=macs)


@describes(StackedForCausalLM)
def stacked(module: StackedForCausalLM, place: Place) -> Parts:
    """The shared weights stay memories of their own, read with every token; each level adds what a stream learned."""
    learner, modules = module.learner, place.below()
    for index, level in enumerate(learner.levels):
        for part in learner.modules[index] if level.frozen else ():
            place.set_frequency(next(name for name, m in modules.items() if m is part), NEVER)
    if not module.learning or not learner.fast:
        return
    found = fast_weights(learner, modules)
    for (owner, index), parts in found.items():
        level, own = learner.levels[index], f"{owner}.levels.{index}"
        held = {f"{name.removeprefix(owner).lstrip('.')}.weight".lstrip("."): p.weight for name, p in parts.items()}
        change = "D x for each W of the block, D = θ − θ₀" if level.rank is None else "B (A x), A fixed, B learned"
        yield from in_context_level(
            place, own, level, learned(level, held), macs=sum(reads(level, w) for w in held.values()),
            initial=(owner,), retrieval=f"y = W x + {change}",
            summed=None if level.chunk_size == learner.chunk_size else Frequency.every(learner.chunk_size),
            note=_NOTE[learner.variant],
        )  # fmt: skip
        how = "through every update" if learner.meta_grad == "full" else "first order"
        yield Transfer(place.path(own), place.path(owner), "backpropagation", f"meta-gradient, {how}")
    slower = dict(itertools.pairwise(learner.fast))
    for (above, fast), (below, slow) in itertools.product(found, repeat=2):  # the fastest level stands last
        if slow == slower.get(fast) and _chain(above) == _chain(below):
            source, target = place.path(f"{above}.levels.{fast}"), place.path(f"{below}.levels.{slow}")
            yield Transfer(source, target, "backpropagation", "error of the chunk's next tokens")


def _chain(owner: str) -> str:
    """The MLP whose added blocks form a chain; MLPs that are levels themselves form one through the whole model."""
    return owner.rpartition(".added.")[0]


_NOTE = {
    "sequential": "the error's way back through shared weights is not in its costs",
    "nested": "begins anew after each update of a slower level (NL Eq. 72); the error's way back through shared "
    "weights is not in its costs",
}


def fast_weights(learner: Learner, modules: Mapping[str, nn.Module]) -> dict[tuple[str, int], dict[str, FastLinear]]:
    """Linear layers that learn in the stream, by the name of the memory of their shared weights and their level."""
    names = {id(module): name for name, module in modules.items()}
    found: dict[tuple[str, int], dict[str, FastLinear]] = {}
    for index in learner.fast:
        for part in learner.modules[index]:
            name = names[id(part)]
            parent = name.rpartition(".")[0]
            block = description_of(modules[parent]) in (mlp, added_block, level_block)
            found.setdefault((parent if block else name, index), {})[name] = part
    return found
