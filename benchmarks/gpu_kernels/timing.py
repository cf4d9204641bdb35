"""How long the kernels take: a step of a memory, and a layer beside a softmax block."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import torch

from benchmarks.gpu_kernels.inputs import DEVICE, WIDTH, by_kernels, prepare, use
from nestling.layers.titans import SelfModifyingTitans
from nestling.ops import triton as kernels


class TookTooLong(Exception):
    pass


go: Path | None = None  # a file: what is compiled waits for it, to be timed alone on the device


def wait() -> None:
    """Return when the file `go` is there."""
    while go is not None and not go.exists():
        time.sleep(0.05)


def milliseconds(function, repeats=10) -> float:
    for _ in range(2):
        function()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / repeats


def graphed(function):
    """The function as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def time_step(kind, tokens, precision, warps=None) -> dict:
    """As CUDA graphs: a chunk forward, and forward with backward."""
    use(precision, warps)
    step, run = prepare(kind, tokens, torch.float32, DEVICE), by_kernels(kind)
    leaves = [t for t in step if t is not None]
    outputs = [o for o in run(step, False) if o is not None]
    grads = [torch.ones_like(o) for o in outputs]

    def forward():
        with torch.no_grad():
            run(step, False)

    def both():
        torch.autograd.grad([o for o in run(step, False) if o is not None], leaves, grads)

    found = dict(forward_ms=milliseconds(graphed(forward)), both_ms=milliseconds(graphed(both)))
    found["both_eager_ms"] = milliseconds(both)
    found["kernels"] = kernel_times(both)
    return found


def kernel_times(function) -> dict:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    rows = [e for e in profile.key_averages() if e.self_device_time_total > 0]
    rows.sort(key=lambda e: -e.self_device_time_total)
    top = {e.key[:60]: [e.count, round(e.self_device_time_total, 1)] for e in rows[:14]}
    return dict(
        launches=sum(e.count for e in rows), busy_us=round(sum(e.self_device_time_total for e in rows)), top=top
    )


class Block(torch.nn.Module):
    """A softmax block to compare with: attention and an MLP of 4 widths."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, linear = heads, torch.nn.Linear
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = linear(width, 3 * width), linear(width, width)
        self.up, self.down = linear(width, 4 * width), linear(4 * width, width)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norms[0](x)).chunk(3, -1))
        read = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(read.transpose(1, 2).flatten(2))
        return x + self.down(torch.nn.functional.gelu(self.up(self.norms[1](x))))


def time_layer(
    chunk, precision, with_kernels=True, tokens=4096, batch=4, profiled=False, graph=True, eager=True, whole=False
) -> dict:
    """Forward and backward in bf16; chunk None is the softmax block; whole: a chunk in one program. Times in ms."""
    use(precision, None)
    os.environ["NESTLING_TRITON"] = "whole" if whole else "1"
    torch.manual_seed(0)
    width = 16 * WIDTH
    layer = (Block(width, 16) if chunk is None else SelfModifyingTitans(width, 16, chunk_size=chunk)).cuda()
    x = torch.randn(batch, tokens, width, device="cuda", requires_grad=True)
    leaves = [x, *layer.parameters()]

    def both():
        with torch.autocast("cuda", torch.bfloat16):
            y = layer(x)
            y = y if chunk is None else y[0]
        return torch.autograd.grad(y.float().square().mean(), leaves, allow_unused=True)

    found = dict(chunk=chunk, precision=precision, kernels=with_kernels, tokens=tokens, batch=batch)
    with contextlib.nullcontext() if with_kernels else kernels.disabled():
        begin = time.perf_counter()
        grads = both()
        torch.cuda.synchronize()
        found["finite"] = all(bool(g.isfinite().all()) for g in grads if g is not None)
        found["first_s"] = time.perf_counter() - begin
        wait()
        eager = eager and (go is not None or found["first_s"] < 6)
        steps = (("ms", milliseconds, eager), ("profile", kernel_times, profiled),
                 ("graph_ms", lambda f: milliseconds(graphed(f), 3), graph))  # fmt: skip
        for name, measure, wanted in steps:
            if wanted:
                try:
                    found[name] = measure(both) if name != "ms" else measure(both, 2)
                except Exception as problem:
                    found[name] = f"{type(problem).__name__}: {problem}"[:1500]
                    if isinstance(problem, TookTooLong):
                        raise
    found["tokens_per_s"] = round(1000 * batch * tokens / found.get("graph_ms", found.get("ms", 1)))
    return found
