"""A step of M3 beside torch's Muon and AdamW, on the matrices of a model of 125M parameters."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.clock import device, free, once, set_tf32
from benchmarks.gpu.record import Record
from nestling.optim import M3, DeltaMomentum

PERIOD = 16  # of M3's slow scale


def contenders() -> dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]:
    return {
        "M3": partial(M3, lr=1e-4),
        "M3, no check of the gradients": partial(M3, lr=1e-4, nonfinite="ignore"),
        "M3, polar_express_4": partial(M3, lr=1e-4, ns_steps=4, coefficients="polar_express_4"),
        "M3, float32": partial(M3, lr=1e-4, ns_dtype=torch.float32),
        "M3, one after the other": partial(M3, lr=1e-4, foreach=False),
        "torch.optim.Muon": partial(torch.optim.Muon, lr=1e-4),
        "DeltaMomentum": partial(DeltaMomentum, lr=1e-4),
        "AdamW, fused": partial(torch.optim.AdamW, lr=1e-4, fused=True),
        "AdamW, foreach": partial(torch.optim.AdamW, lr=1e-4, foreach=True),
    }


def run(record: Record, options: dict[str, Any]) -> None:
    layers, dim = (1, 16) if options["quick"] else (12, 768)
    set_tf32("float32")
    shapes = [(dim, dim)] * 4 + [(3 * dim, dim)] * 2 + [(dim, 3 * dim)]
    weights = [nn.Parameter(torch.randn(shape, device=device())) for _ in range(layers) for shape in shapes]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    record.put("model", "parameters", sum(w.numel() for w in weights))
    for name, make in contenders().items():
        record.attempt("optimisers", name, partial(_times, make, weights), 12)
        free()


def _times(make: Callable, weights: list[nn.Parameter]) -> dict[str, Any]:
    """Median of the steps of one slow period, the slow step, and the mean of them all."""
    optimizer = make(weights)
    for _ in range(PERIOD):
        optimizer.step()
    times = [once(optimizer.step) for _ in range(PERIOD)]
    state = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values()
                if isinstance(t, torch.Tensor))  # fmt: skip
    parameters = sum(w.numel() for w in weights)
    return {"ms": statistics.median(times), "slowest ms": max(times), "mean ms": statistics.fmean(times),
            "bytes of state per parameter": state / parameters}  # fmt: skip
