"""The continuum memory as memories: a block for each level, and what learns inside a context (NL Eqs. 70-74)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping

import torch

from nestling.cms.blocks import ContinuumMemory, LevelBlock
from nestling.nested_system.describe import Place, describes
from nestling.nested_system.descriptions.torch_modules import Parts
from nestling.nested_system.descriptions.torch_optim import ELEMENTWISE, HEBBIAN
from nestling.nested_system.formalism import AssociativeMemory, Cost, Solver, Transfer
from nestling.nested_system.frequency import NEVER, Frequency
from nestling.schedule import Level


@describes(ContinuumMemory)
def continuum(module: ContinuumMemory, place: Place) -> Parts:
    """A chain of MLP blocks: each trains at the frequency of its level (NL Eqs. 70-74, decision D10)."""
    if module.aggregate is not None:
        yield place.weights(
            "aggregation",
            ("aggregate",),
            retrieval="y = x + Σₗ aₗ blockₗ(x)",
            macs=module.aggregate.numel() * module.dim,
            name="aggregate",
        )
    kinds = level_kinds(module.levels, place.context_length)
    fastest = next((level.chunk_size for level, kind in zip(module.levels, kinds) if kind == "fast"), None)
    for index, (level, kind) in enumerate(zip(module.levels, kinds)):
        block = f"blocks.{index}"
        if kind == "frozen":
            place.set_frequency(block, NEVER)
        elif kind == "slow":
            place.set_frequency(block, Frequency.every(level.chunk_size))
        elif kind == "fast":
            place.initial_state(block)
            summed = None if level.chunk_size == fastest else Frequency.every(fastest)
            yield from _fast_level(module, place, index, level, summed)
    yield from _chain(module, place, kinds)


def level_kinds(levels: tuple[Level, ...], context_length: int) -> list[str]:
    """ "fast", "outer", "slow" or "frozen" for each level, as `Schedule` names them, for any size of outer step."""
    outer = next((i for i, level in enumerate(levels) if level.chunk_size is None), math.inf)
    kinds = []
    for index, level in enumerate(levels):
        if level.frozen:
            kinds.append("frozen")
        elif level.chunk_size is None:
            kinds.append("outer")
        else:
            kinds.append("fast" if index < outer and level.chunk_size < context_length else "slow")
    return kinds


def _fast_level(module: ContinuumMemory, place: Place, index: int, level: Level, summed: Frequency | None) -> Parts:
    """A block of the layer that learns inside the context; the module's own weights are where it begins."""
    block = module.blocks[index]
    own = {n: p for n, p in block.named_parameters() if p.ndim == 2}
    weights, macs = learned(level, own), sum(reads(level, p) for p in own.values())
    yield from in_context_level(
        place, f"levels.{index}", level, weights, macs=macs, initial=(f"blocks.{index}",), summed=summed
    )


def learned(level: Level, weights: Mapping[str, torch.Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of what a level holds of each weight [o, i]: as much, or of low rank the factor [o, r]."""
    return {
        name: (
            tuple(w.shape) if level.rank is None else (w.shape[0], level.rank),
            torch.promote_types(w.dtype, torch.float32),
        )
        for name, w in weights.items()
    }


def reads(level: Level, weight: torch.Tensor) -> int:
    """Multiply-adds of a token's read of what a level holds of a weight [o, i]."""
    return weight.numel() if level.rank is None else level.rank * sum(weight.shape)


def in_context_level(
    place: Place,
    name: str,
    level: Level,
    weights: dict[str, tuple[tuple[int, ...], torch.dtype]],
    *,
    macs: int,
    initial: tuple[str, ...],
    retrieval: str = "x + block(x)",
    summed: Frequency | None = None,
    note: str = "",
) -> Parts:
    """Per-sequence weights that learn from each chunk of the text, with what their optimiser remembers (NL Eq. 71).

    Args:
        name: of the memory, relative to the place.  level: decides chunk size, rule and step.
        weights: shape and type of each.  macs: multiply-adds of a token's read.
        initial: relative names of the memories they begin from.
        summed: how often gradients are added up between two updates, None where each update has one gradient.
    """
    own = place.path(name)
    tensors = tuple(place.state(f"{name}.{n}", shape, dtype) for n, (shape, dtype) in weights.items())
    size, count = sum(t.bytes for t in tensors), sum(t.numel for t in tensors)
    often = Frequency.every(level.chunk_size)
    moments = _MOMENTS[level.optimizer]
    direction = _DIRECTIONS[level.optimizer]
    kept = "θ" if not level.decay else f"θ₀ + {1 - level.decay:g} (θ − θ₀)"
    clip = "" if level.clip is None else f", |g| ≤ {level.clip:g}"
    yield AssociativeMemory(
        own,
        "in-context level",
        "tokens, of a chunk",
        "next tokens, those that follow",
        "mean next-token loss of its chunk (NL Eq. 71)",
        retrieval=retrieval,
        update=f"θ ← {kept} − η {direction} at the end of a chunk",
        solver=Solver("gradient", _RULES[level.optimizer], f"η = {level.lr:g}{clip}"),
        frequency=often,
        context="sequence",
        feasible=f"ℝ^{count}",
        tensors=tensors,
        needs=tuple(f"{own}.{kind}" for kind, _ in moments),
        lifetime="context",
        cost=Cost(0, size, macs, size, 2 * macs, 0, count, 3 * size),
        note=note,
    )
    for start in initial:
        yield Transfer(place.path(start), own, "initialization", "θ₀ of every sequence (NL Eq. 73)")
    if summed is not None:
        yield AssociativeMemory(
            f"{own}.sum",
            "in-context gradient sum",
            "—",
            "g, gradients of the chunks",
            "−⟨s, g⟩, value-less",
            retrieval="s",
            update="s ← s + g, emptied by the step",
            solver=Solver("gradient", "gradient descent, one step"),
            frequency=summed,
            context="surprise in context",
            feasible=f"ℝ^{count}",
            tensors=tuple(place.state(f"{name}.sum.{n}", shape, dtype) for n, (shape, dtype) in weights.items()),
            lifetime="context",
            cost=Cost(0, size, step_macs=count, step_bytes=3 * size),
        )
        yield Transfer(own, f"{own}.sum", "generation", "gradients of its chunks")
        if not moments:
            yield Transfer(f"{own}.sum", own, "parametric", "the summed gradient")
    source, what = (own, "gradients of its chunks") if summed is None else (f"{own}.sum", "summed gradients")
    for kind, update in moments:
        states = tuple(place.state(f"{name}.{kind}.{n}", shape, dtype) for n, (shape, dtype) in weights.items())
        yield AssociativeMemory(
            f"{own}.{kind}",
            f"in-context {kind}",
            "—",
            "g, gradients of the chunks",
            ELEMENTWISE if kind == "second moment" else HEBBIAN,
            retrieval={"second moment": "v", "slow moment": "M₂", "slow direction": "o"}.get(kind, "m"),
            update=update.format(beta=level.momentum),
            solver=Solver("gradient", "gradient descent, one step"),
            frequency=Frequency.every(16 * level.chunk_size) if kind == "slow direction" else often,
            context="surprise in context",
            feasible=f"ℝ^{count}",
            tensors=states,
            lifetime="context",
            cost=Cost(0, size, step_macs=count, step_bytes=3 * size),
        )
        yield Transfer(source, f"{own}.{kind}", "generation", what)
        yield Transfer(f"{own}.{kind}", own, "parametric", "the step it proposes")


_RULES = {
    "gd": "gradient descent", "momentum": "gradient descent with momentum", "adamw": "Adam",
    "dgd": "Delta Gradient Descent", "m3": "M3", "spectral": "steepest descent under the spectral norm",
}  # fmt: skip
_DIRECTIONS = {
    "gd": "∂L/∂θ", "momentum": "m", "adamw": "m̂ / √v̂", "dgd": "(∂L/∂θ + (θ − θ₀) x xᵀ) / (1 + η |x|²)",
    "m3": "(NS(m) + α o) / √v, of matched size", "spectral": "σ(W) NS(∂L/∂θ), σ(W) the mean singular value",
}  # fmt: skip
_MOMENTS = {
    "gd": (),
    "dgd": (),
    "spectral": (),
    "m3": (
        ("first moment", "m ← β m + (1 − β) g, β = {beta:g}"),
        ("second moment", "v ← 0.999 v + 0.001 g²"),
        ("slow moment", "M₂ ← 0.9 M₂ + 0.1 mean of the last 16 g"),
        ("slow direction", "o = NS(M₂), every 16 updates"),
    ),
    "momentum": (("momentum", "m ← {beta:g} m + g"),),
    "adamw": (("first moment", "m ← β m + (1 − β) g, β = {beta:g}"), ("second moment", "v ← 0.999 v + 0.001 g²")),
}


@describes(LevelBlock)
def level_block(module: LevelBlock, place: Place) -> Parts:
    """The MLP of one level, with its norm."""
    macs = sum(p.numel() for p in module.parameters() if p.ndim == 2)
    retrieval = "y = W₁ σ(W₂ n)" if module.gate_proj is None else "y = W₁ (σ(W₃ n) ⊙ W₂ n)"
    yield place.weights("MLP block", None, retrieval=f"{retrieval},  n = norm(x)", macs=macs)


def _chain(module: ContinuumMemory, place: Place, kinds: list[str]) -> Iterator[Transfer]:
    """One gradient flow through the levels; in the nested variant a slower level is the faster one's initial state."""

    blocks = [place.path(f"{'levels' if kind == 'fast' else 'blocks'}.{i}") for i, kind in enumerate(kinds)]
    for fast, slow in itertools.pairwise(blocks):
        if module.variant != "independent":
            yield Transfer(slow, fast, "backpropagation", "error through the chain")
        if module.variant == "nested":
            yield Transfer(slow, fast, "initialization", "state at the end of its context (NL Eq. 72)")
