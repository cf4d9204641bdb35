"""flash-linear-attention's kernels of the same layers, where it is installed. They compile before their turn."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.clock import device, free, milliseconds, on_gpu, once, peak_bytes, train_step
from benchmarks.gpu.record import Record
from benchmarks.gpu.speed import TOKENS, mebibytes

LAYERS = {
    "fla GatedDeltaNet": ("gated_deltanet", "GatedDeltaNet", dict(head_dim=64, num_heads=16, expand_v=1)),
    "fla DeltaNet": ("delta_net", "DeltaNet", dict(num_heads=16, use_gate=True)),
}
LENGTHS = (4096, 1024)


def run(record: Record, options: dict[str, Any], turn: Callable[[], None]) -> None:
    ready, dim = {}, 1024
    if not on_gpu():
        record.put("peers", "all", {"left out": "these kernels need a GPU"})
        return
    for name in LAYERS:
        for tokens in LENGTHS:
            record.attempt("first call", f"{name}, T {tokens}", partial(_first, name, dim, tokens, ready), 120)
    turn()
    for (name, tokens), step in ready.items():
        record.attempt("peers", f"{name}, width {dim}, T {tokens}, bf16", partial(_row, step), 10)
        free()


def _first(name: str, dim: int, tokens: int, ready: dict) -> dict[str, Any]:
    module, layer, options = LAYERS[name]
    torch.manual_seed(0)
    built = getattr(importlib.import_module(f"fla.layers.{module}"), layer)(hidden_size=dim, **options)
    built = built.to(device(), torch.bfloat16)
    x = torch.randn(TOKENS // tokens, tokens, dim, device=device(), dtype=torch.bfloat16)
    step = train_step(built, x, "float32")
    first = [once(step) for _ in range(2)]
    ready[name, tokens] = step
    return {"first calls ms": first, "parameters": sum(p.numel() for p in built.parameters())}


def _row(step: Callable[[], None]) -> dict[str, Any]:
    time = milliseconds(step, budget=0.8, most=20)
    return time | {"tokens/s": 1e3 * TOKENS / time["ms"], "peak MiB": mebibytes(peak_bytes(step))}
