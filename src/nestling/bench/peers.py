"""Public implementations of the same ideas, where they are installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from nestling.bench import measure
from nestling.bench.modules import layer_of
from nestling.bench.settings import BenchSettings
from nestling.bench.table import Table, compare


def peers(settings: BenchSettings) -> Table:
    """Public implementations of the same ideas, where they are installed, at the target's size."""
    s = settings
    x = s.random(s.batch, s.tokens, s.dim)
    found, notes = {"selfmod": measure.train_step(layer_of(s), x, s)}, []
    for name, build in PEERS.items():
        try:
            found[name] = build(s, x)
        except ImportError as error:
            notes.append(f"{name}: skipped, {error.name or error} is not installed.")
    timing = measure.interleave(found, s)
    rows = [{"layer": name} | compare(timing, name, "selfmod", s.batch * s.tokens) for name in found]
    return Table(f"Public implementations, T {s.tokens}", rows, notes)


def _titans_pytorch(settings: BenchSettings, x: Tensor) -> Callable[[], None]:
    neural_memory = importlib.import_module("titans_pytorch").NeuralMemory
    torch.manual_seed(0)
    size = settings.dim // settings.heads
    layer = neural_memory(dim=settings.dim, chunk_size=64, heads=settings.heads, dim_head=size).to(x.device)
    return measure.train_step(layer, x, settings)


def _nested_learning(settings: BenchSettings, x: Tensor) -> Callable[[], None]:
    """Its training step: gradients of a pass without writes, then a pass that writes without gradients."""
    module = importlib.import_module("nested_learning.titan.self_modifying")
    torch.manual_seed(0)
    config = module.SelfModifyingTitansConfig(dim=settings.dim, chunk_size_other=64, momentum=0.9)
    layer = module.SelfModifyingTitans(config).to(x.device)
    gradients = measure.train_step(layer, x, settings)

    def step() -> None:
        gradients()
        layer.apply_updates_inplace(x)

    return step


PEERS = {
    "titans-pytorch NeuralMemory (one kind of memory)": _titans_pytorch,
    "nested-learning SelfModifyingTitans (no gradients through writes)": _nested_learning,
}
