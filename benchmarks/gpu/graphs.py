"""The same kernels without their launches: forward and backward pass, or one written token, replayed as a CUDA graph.

What a replay takes is the device's own time: all that fewer launches can win, and what larger kernels must beat.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.clock import device, free, milliseconds, on_gpu, set_tf32
from benchmarks.gpu.record import Record
from benchmarks.gpu.speed import CHUNKS, HEAD, TOKENS, block, layer_operations, mixer, rates


def run(record: Record, options: dict[str, Any]) -> None:
    quick, rate = options["quick"], options["rates"].get("bf16 product TFLOP/s")
    dim, head, tokens, total, chunks = (32, 16, 64, 64, (16,)) if quick else (1024, HEAD, 4096, TOKENS, CHUNKS)
    set_tf32("bf16+tf32")
    for name in ("hope_memory", "selfmod", "attention"):
        record.attempt("token", f"{name}, width {dim}", partial(_token, name, dim, dim // head), 10)
    for chunk in chunks[:4]:
        act = partial(_step, "selfmod", dim, dim // head, total // tokens, tokens, chunk, rate)
        record.attempt("step", f"selfmod, chunk {chunk}", act, 20)
        free()
    for name in ("block", "hope_memory", "window_attention"):
        act = partial(_step, name, dim, dim // head, total // tokens, tokens, 64, rate)
        record.attempt("step", f"{name}, chunk 64" if name != "block" else name, act, 20)
        free()


def _step(
    name: str, dim: int, heads: int, batch: int, tokens: int, chunk: int, rate: float | None
) -> dict[str, float | None]:
    layer = block(dim, heads, "bf16") if name == "block" else mixer(name, dim, heads, chunk_size=chunk)
    x = torch.randn(batch, tokens, dim, device=device()).requires_grad_()

    def step() -> None:
        # without its cache of cast weights: those would be kept outside the graph's memory
        with torch.autocast(device(), torch.bfloat16, cache_enabled=False):
            y = layer(x)
        y = y[0] if isinstance(y, tuple) else y
        y.float().square().mean().backward()

    def forget() -> None:
        x.grad = None
        layer.zero_grad(set_to_none=True)

    found = milliseconds(captured(step, forget), budget=0.4, most=10)
    if name == "block":
        work = layer.operations(batch, tokens, dim)
    else:
        work = batch * tokens * layer_operations(name, dim, heads, chunk)
    return found | rates(work, batch * tokens, found["ms"], rate)


def _token(name: str, dim: int, heads: int) -> dict[str, float]:
    """A layer's step of one token in the middle of a chunk."""
    layer: nn.Module = mixer(name, dim, heads)
    x = torch.randn(1, 101, dim, device=device())
    with torch.no_grad():
        _, state = layer(x[:, :-1])
        replay = captured(lambda: layer(x[:, -1:], state), lambda: None)
    return milliseconds(replay, budget=0.2)


def captured(step: Callable[[], object], forget: Callable[[], None]) -> Callable[[], None]:
    """A replay of `step`; `forget` drops the gradients that runs before the capture have left."""
    if not on_gpu():  # the quick form runs the step itself
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            forget()
            step()
    torch.cuda.current_stream().wait_stream(stream)
    forget()
    graph, kept = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        kept.append(step())  # results live as long as the replay does

    def replay() -> None:
        graph.replay()

    replay.kept = kept
    return replay
