"""`torch.compile` on the layers. It compiles while other parts run, and measures when it is its turn."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch._dynamo

from benchmarks.gpu.clock import device, free, milliseconds, once, set_tf32, train_step
from benchmarks.gpu.record import Record
from benchmarks.gpu.speed import block, mixer

CASES = (("block", "default"), ("hope_memory", "default"), ("selfmod", "default"))


def run(record: Record, options: dict[str, Any], turn: Callable[[], None]) -> None:
    dim, heads, batch, tokens, chunk = (32, 2, 1, 32, 16) if options["quick"] else (1024, 16, 16, 512, 128)
    set_tf32("bf16+tf32")
    ready, backend = {}, "aot_eager" if options["quick"] else "inductor"
    for name, mode in CASES[: 2 if options["quick"] else None]:
        torch._dynamo.reset()
        key = f"{name}, {mode or 'default'}"
        make = partial(_compiled, name, mode, backend, dim, heads, batch, tokens, chunk, ready)
        record.attempt("compile", key, make, 100)
    turn()
    for (name, mode), (plain, fast) in ready.items():
        record.attempt("compiled", f"{name}, {mode or 'default'}", partial(_times, plain, fast), 10)
        free()


def _compiled(
    name: str, mode: str | None, backend: str, dim: int, heads: int, batch: int, tokens: int, chunk: int, ready: dict
) -> dict[str, Any]:
    torch._dynamo.utils.counters.clear()
    module = block(dim, heads, "bf16") if name == "block" else mixer(name, dim, heads, chunk_size=chunk)
    x = torch.randn(batch, tokens, dim, device=device())
    how = dict(backend=backend) if backend != "inductor" else dict(mode=mode)
    fast = train_step(torch.compile(module, **how), x, "bf16")
    first = [once(fast) for _ in range(2)]
    counters = torch._dynamo.utils.counters
    ready[name, mode] = (train_step(module, x, "bf16"), fast)
    breaks = {str(k)[:200]: v for k, v in counters["graph_break"].items()}
    return {"tokens": tokens, "batch": batch, "chunk": chunk, "first calls ms": first, "graph breaks": breaks,
            "graphs": counters["stats"].get("unique_graphs", 0)}  # fmt: skip


def _times(plain: Callable[[], None], fast: Callable[[], None]) -> dict[str, Any]:
    eager, compiled = (milliseconds(f, budget=0.6, most=10) for f in (plain, fast))
    return {"eager ms": eager["ms"], "compiled ms": compiled["ms"], "times as fast": eager["ms"] / compiled["ms"]}
