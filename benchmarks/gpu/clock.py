"""Times by the device's own events, operations by counting, memory by the allocator's peak."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

patience = 1.0  # what every time budget is multiplied by


def on_gpu() -> bool:
    return torch.cuda.is_available()


def device() -> str:
    return "cuda" if on_gpu() else "cpu"


def synchronize() -> None:
    if on_gpu():
        torch.cuda.synchronize()


def autocast(precision: str):
    """The context of a forward pass: "bf16" and "bf16+tf32" are autocast, "float32" and "tf32" are not."""
    return torch.autocast(device(), torch.bfloat16) if precision.startswith("bf16") else nullcontext()


def set_tf32(precision: str) -> None:
    """Whether float32 products may round their factors to TF32: not unless the precision says so."""
    torch.set_float32_matmul_precision("high" if "tf32" in precision else "highest")


def milliseconds(function: Callable[[], object], budget: float = 1.0, most: int = 20) -> dict[str, float]:
    """Median time of a call, after two calls that warm up (one, where a call takes longer than `budget` seconds)."""
    budget *= patience
    first = once(function)
    warm = once(function) if first < 1e3 * budget else first
    repeats = max(1, min(most, int(1e3 * budget / max(warm, 1e-3))))
    times = [once(function) for _ in range(repeats)]
    return {"ms": statistics.median(times), "low": min(times), "high": max(times), "calls": repeats}


def once(function: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    if not on_gpu():
        begin = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - begin)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def peak_bytes(function: Callable[[], object]) -> int | None:
    """Bytes a call takes at most beyond what is held before it; None on a CPU."""
    if not on_gpu():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def free() -> None:
    """Give back what no one holds."""
    gc.collect()
    if on_gpu():
        torch.cuda.empty_cache()


def train_step(layer: nn.Module, x: Tensor, precision: str, set_to_none: bool = True) -> Callable[[], None]:
    """A call that runs a layer forward and backward, gradients of input and weights included."""
    x = x.detach().requires_grad_()

    def step() -> None:
        with autocast(precision):
            y = layer(x)
        y = y[0] if isinstance(y, tuple) else y
        y.float().square().mean().backward()
        if set_to_none:
            layer.zero_grad(set_to_none=True)
            x.grad = None

    return step


def _in_place_product(_self, a, b, *args, out_shape=None, **kwargs) -> int:
    return 2 * a[0] * a[1] * a[2] * b[-1]


def _triangular(a, b, *args, out_shape=None, **kwargs) -> int:
    """n^2 multiply-adds per right-hand side, halved by the triangle."""
    return math.prod(b) * a[-1]


def operations(function: Callable[[], object]) -> int:
    """Floating-point operations of the products and triangular solves of a call; a multiply-add is two."""
    extra = {torch.ops.aten.baddbmm_: _in_place_product, torch.ops.aten.linalg_solve_triangular: _triangular}
    with FlopCounterMode(display=False, custom_mapping=extra) as counter:
        function()
    return counter.get_total_flops()
