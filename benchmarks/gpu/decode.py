"""Writing one token at a time: milliseconds, and how many kernels a token takes."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.clock import device, free, milliseconds, once, set_tf32
from benchmarks.gpu.profiling import kernels
from benchmarks.gpu.record import Record
from benchmarks.gpu.speed import mixer
from nestling import HopeForCausalLM
from nestling.models import sizes

LAYERS = ("hope_memory", "window_attention", "selfmod", "attention")
MODELS = ("hope", "attention")


def run(record: Record, options: dict[str, Any]) -> None:
    quick = options["quick"]
    size, prompt, count = ("tiny", 20, 3) if quick else ("125m", 1024, 24)
    set_tf32("float32")
    for name in LAYERS:
        dim, heads = (32, 2) if quick else (1024, 16)
        record.attempt("layer", f"{name}, width {dim}", partial(_layer, name, dim, heads, prompt), 8)
    for batch in (1, 2 if quick else 32):
        for name in MODELS:
            key = f"{size} with {name}, batch {batch}, bf16"
            record.attempt("model", key, partial(_model, size, name, batch, prompt, count), 15)
            free()


@torch.no_grad()
def _layer(name: str, dim: int, heads: int, prompt: int) -> dict[str, Any]:
    layer = mixer(name, dim, heads)
    x = torch.randn(1, prompt + 1, dim, device=device())
    _, state = layer(x[:, :-1])

    def step() -> None:
        layer(x[:, -1:], state)

    found = milliseconds(step, budget=0.3)
    found |= {name: value for name, value in kernels(step, found["ms"]).items() if name != "top"}
    return found


@torch.no_grad()
def _model(size: str, name: str, batch: int, prompt: int, count: int) -> dict[str, Any]:
    torch.manual_seed(0)
    config = sizes.config(size, mixer=name)
    model = HopeForCausalLM(config).to(device(), torch.bfloat16).eval()
    ids = torch.randint(config.vocab_size, (batch, prompt), device=device())
    cache = None

    def read() -> None:
        nonlocal cache
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values

    def write() -> None:
        nonlocal cache
        cache = model(ids[:, :1], past_key_values=cache, use_cache=True).past_key_values

    once(read)
    prefill = once(read)
    once(write)
    times = [once(write) for _ in range(count)]
    found = {"prefill ms": prefill, "ms": statistics.median(times), "slowest ms": max(times), "position": prompt}
    seen = kernels(write, found["ms"])
    return found | {"kernels launched": seen["kernels launched"], "% busy": seen["% busy"]}
