"""`torch.compile` of a two-layer Hope: what the first step costs, and steps after it beside eager ones.

    python -m benchmarks.compiling --json benchmarks/results/compile.json

Loss and gradients are compared first. The compiler's caches on disk are left out: they are what a second process has.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import nestling


def step(model: nestling.HopeForCausalLM, call: Callable, ids: torch.Tensor) -> list[torch.Tensor]:
    """Loss and gradients of one training step."""
    model.zero_grad()
    loss = call(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def timed(call: Callable) -> tuple[Any, float, float]:
    """What it returns, seconds, and processor seconds with those of the processes it started."""

    def spent() -> float:
        return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))

    begun, before = time.perf_counter(), spent()
    found = call()
    return found, time.perf_counter() - begun, spent() - before


def measure(mixer: str, backend: str, width: int, batch: int, tokens: int, repeats: int) -> dict[str, Any]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = nestling.HopeConfig(hidden_size=width, num_hidden_layers=2, mixer=mixer)
    model = nestling.HopeForCausalLM(config).train()
    ids = torch.randint(0, config.vocab_size, (batch, tokens))
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    expected = step(model, model, ids)
    found, first, first_cpu = timed(lambda: step(model, compiled, ids))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    rounds = [(timed(lambda: step(model, model, ids))[1], timed(lambda: step(model, compiled, ids))[1])
              for _ in range(repeats)]  # fmt: skip
    eager, later = (statistics.median(part) for part in zip(*rounds, strict=True))
    return {
        "mixer": mixer, "backend": backend, "width": width, "batch": batch, "tokens": tokens,
        "first step s": first, "first step, processor s": first_cpu, "eager step ms": 1e3 * eager,
        "compiled step ms": 1e3 * later, "times as fast": statistics.median(a / b for a, b in rounds),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mixers", default="selfmod,gated_deltanet,attention")
    parser.add_argument("--backends", default="aot_eager,inductor")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    load, rows = os.getloadavg()[0], []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        for mixer in options.mixers.split(","):
            for backend in options.backends.split(","):
                sizes = options.width, options.batch, options.tokens, options.repeats
                rows.append(measure(mixer, backend, *sizes))
                print(json.dumps(rows[-1]), flush=True)
    if options.json is not None:
        found = {
            "torch": torch.__version__,
            "threads": 1,
            "load before, after": [load, os.getloadavg()[0]],
            "rows": rows,
        }
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
