"""Processes side by side compile the kernels, which are then taken from Triton's cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import torch

from benchmarks.gpu_kernels.inputs import DEVICE, WIDTH, by_kernels, loss_of, prepare, use
from nestling.layers.titans import SelfModifyingTitans

LAYERS = [(64, "tf32x3"), (64, "tf32"), (32, "tf32x3"), (16, "tf32x3")]
OTHER_WARPS = [(64, "tf32", 4), (64, "tf32x3", 4)]
# one process compiles one of the heavy kernels, or all the light ones of one direction
JOBS = [
    ("layer", (*c, None), part) for c in LAYERS for part in ("second", "first", "gate", "rule", "backward", "forward")
]
JOBS += [("mlp", c, part) for c in OTHER_WARPS for part in ("second", "first", "rule", "backward", "forward")]


def part_of(name: str, options: dict) -> str:
    """Which process compiles a kernel."""
    if name == "chunk_backward":
        return "second" if options["ACTIVE"] else "first" if options["ADD"] else "gate"
    if name == "chunk_forward":
        return "rule"
    return "backward" if name.endswith("backward") else "forward"


def compile_job(index: int) -> None:
    """Launch only some kernels of a step: the others are compiled by other processes at the same time."""
    kind, (tokens, precision, warps), part = JOBS[index]
    from nestling.ops.triton import bounded, inner, inner_linear, rule, rule_backward, table

    use(precision, warps)
    times = {}

    class Only:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, **options):
                name = self.kernel.__name__
                if part_of(name, options) != part:
                    return
                key = f"{name} {[v for k, v in sorted(options.items()) if k.isupper()]}"
                begin = time.perf_counter()
                made = self.kernel[grid](*args, **options)
                torch.cuda.synchronize()
                times.setdefault(key, dict(
                    seconds=round(time.perf_counter() - begin, 2), registers=getattr(made, "n_regs", None),
                    spills=getattr(made, "n_spills", None), shared_kib=made.metadata.shared // 1024,
                ))  # fmt: skip

            return launch

    for module in (bounded, inner, inner_linear, rule, rule_backward, table):
        for name, kernel in list(vars(module).items()):
            if name.endswith(("_forward", "_backward")) and hasattr(kernel, "run"):
                setattr(module, name, Only(kernel))
    if kind == "layer":
        layer = SelfModifyingTitans(16 * WIDTH, 16, chunk_size=tokens).to(DEVICE)
        layer(torch.randn(4, 2 * tokens, 16 * WIDTH, device=DEVICE))[0].sum().backward()
    else:
        loss_of(by_kernels(kind)(prepare(kind, tokens, torch.float32, DEVICE), False)).backward()
    print(json.dumps(times))


def compile_all(seconds: float) -> list[dict]:
    end, found, waiting, running = time.time() + seconds, [], list(range(len(JOBS))), {}
    while (waiting or running) and time.time() < end:
        while waiting and len(running) < max(2, (os.cpu_count() or 4) - 1):
            i = waiting.pop(0)
            command = [sys.executable, "-m", "benchmarks.gpu_kernels", "--job", str(i)]
            running[i] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i, process in list(running.items()):
            if process.poll() is not None:
                out, err = process.communicate()
                row = dict(job=JOBS[i], rc=process.returncode, at=round(time.time() - end + seconds, 1))
                found.append(
                    row
                    | (
                        dict(kernels=json.loads(out.splitlines()[-1]))
                        if not process.returncode
                        else dict(error=err[-3000:])
                    )
                )
                del running[i]
        time.sleep(0.1)
    for i, process in running.items():
        process.kill()
        found.append(dict(job=JOBS[i], error="not compiled in time"))
    return found + [dict(job=JOBS[i], error="left out, no time") for i in waiting]
