"""Where a training step of the layer spends its time: its kernels, their number, and how long the device waits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.clock import device, free, milliseconds, on_gpu, set_tf32, synchronize, train_step
from benchmarks.gpu.record import Record
from benchmarks.gpu.speed import block, mixer

TOP = 15


def run(record: Record, options: dict[str, Any]) -> None:
    dim, heads, batch, tokens = (32, 2, 1, 64) if options["quick"] else (1024, 16, 16, 1024)
    set_tf32("bf16+tf32")
    for name, chunk in (("hope_memory", 64), ("selfmod", 256), ("block", None)):
        key = f"{name}, chunk {chunk}" if chunk else name
        record.attempt("profile", key, partial(_layer, name, chunk, dim, heads, batch, tokens), 25)
        free()


def _layer(name: str, chunk: int | None, dim: int, heads: int, batch: int, tokens: int) -> dict[str, Any]:
    module = block(dim, heads, "bf16") if chunk is None else mixer(name, dim, heads, chunk_size=chunk)
    step = train_step(module, torch.randn(batch, tokens, dim, device=device()), "bf16")
    time = milliseconds(step, budget=0.5, most=5)
    return {"dim": dim, "tokens": tokens, "batch": batch, "ms": time["ms"]} | kernels(step, time["ms"])


def kernels(step: Callable[[], None], ms: float) -> dict[str, Any]:
    """Kernels of one call, by the time they take, beside the call's time without the profiler."""
    activities = [ProfilerActivity.CUDA] if on_gpu() else [ProfilerActivity.CPU]
    synchronize()
    with profile(activities=activities) as seen:
        step()
        synchronize()
    kind = torch.autograd.DeviceType.CUDA if on_gpu() else torch.autograd.DeviceType.CPU
    time, count = defaultdict(float), defaultdict(int)
    for event in seen.events():
        if event.device_type == kind:
            spent = event.time_range.elapsed_us() if on_gpu() else event.self_cpu_time_total
            time[event.name] += spent / 1e3
            count[event.name] += 1
    total, launches = sum(time.values()), sum(count.values())
    rows = [
        {"kernel": name[:110], "calls": count[name], "ms": time[name], "% of busy": 100 * time[name] / max(total, 1e-9)}
        for name in sorted(time, key=time.get, reverse=True)[:TOP]
    ]
    return {"kernels launched": launches, "busy ms": total, "% busy": 100 * total / ms,
            "microseconds per kernel": 1e3 * total / max(launches, 1), "top": rows}  # fmt: skip
