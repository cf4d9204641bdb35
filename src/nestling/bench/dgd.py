"""What seeing its layers' inputs costs Delta Gradient Descent: whole training steps against SGD's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from nestling.bench import measure
from nestling.bench.modules import AttentionBlock
from nestling.bench.settings import BenchSettings
from nestling.bench.table import Table
from nestling.optim import DGD

LAYERS, WIDER = 12, 2  # the target: 12 layers, twice the benchmark's width (512)


def dgd(settings: BenchSettings) -> Table:
    """Forward, backward and optimiser step of a transformer: SGD, DGD, each with and without momentum."""
    s = settings
    optimizers = {
        "SGD": lambda model: torch.optim.SGD(model.parameters(), 1e-3),
        "SGD with momentum": lambda model: torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9),
        "DGD": lambda model: DGD(model, 1e-3),
        "DGD with momentum": lambda model: DGD(model, 1e-3, 0.9),
    }
    timing = measure.interleave({name: _step(build, s) for name, build in optimizers.items()}, s)
    rows = [
        {
            "optimizer": name,
            "s/step": timing.median(name),
            "times SGD": 1 / timing.ratio(name, "SGD"),
            "low": 1 / timing.spread(name, "SGD")[1],
            "high": 1 / timing.spread(name, "SGD")[0],
            "rounds": timing.rounds,
        }
        for name in optimizers
    ]
    title = f"DGD's training step, {LAYERS} layers of width {WIDER * s.dim}, {s.batch} x {s.tokens} tokens"
    note = "In multiply-adds DGD adds one weight gradient to each layer's three products: a third of their cost."
    return Table(title, rows, [note])


def _step(build: Callable[[nn.Module], torch.optim.Optimizer], s: BenchSettings) -> Callable[[], None]:
    torch.manual_seed(0)
    model = nn.Sequential(*(AttentionBlock(WIDER * s.dim, WIDER * s.heads) for _ in range(LAYERS))).to(s.device)
    optimizer, x = build(model), s.random(s.batch, s.tokens, WIDER * s.dim)

    def step() -> None:
        optimizer.zero_grad()
        with s.autocast():
            loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()

    return step
