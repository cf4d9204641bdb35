"""The Triton kernels on a GPU: right against float64, and how long they take, alone and in a layer.

`python3 -m benchmarks.gpu_kernels --out FOLDER`. Kernels are compiled by processes side by side, then used from the cache.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

from nestling.layers.titans import SelfModifyingTitans
from nestling.memory.fused import MLPStep, by_rule
from nestling.ops import triton as kernels
from nestling.ops.chunk import Chunk, chunk_reference, decay_table, delta_chunk

HEADS, STACK, WIDTH = 64, 3, 64  # 4 sequences of 16 heads; memories of k, v and the main one
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MLP = [(64, "tf32x3", 8), (64, "tf32", 8), (64, "tf32", 4), (32, "tf32x3", 4), (32, "tf32", 4), (16, "tf32x3", 4)]
GATES = [(64, "tf32x3", 4), (64, "tf32", 4), (32, "tf32x3", 4), (32, "tf32", 4), (16, "tf32x3", 4)]
PARTS = {"mlp": [[3], [4], [0, 1, 2, 5]], "gate": [[0, 1]]}  # launches of a step compiled by one process
JOBS = [("mlp", c, part) for c in MLP for part in PARTS["mlp"][:2]]
JOBS += [("mlp", c, PARTS["mlp"][2]) for c in MLP] + [("gate", c, [0, 1]) for c in GATES]


class TookTooLong(Exception):
    pass


@contextlib.contextmanager
def limit(seconds: float):
    def stop(*_):
        raise TookTooLong(f"more than {seconds:.0f} s")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def tables(groups, tokens):
    kind = dict(dtype=torch.float64)
    return decay_table(torch.rand(groups, tokens, **kind) * 0.1 + 0.9, torch.rand(groups, tokens, **kind) * 0.9)


def mlp_arguments(tokens, n=STACK, groups=HEADS, p=WIDTH):
    torch.manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    def unit(*shape):
        return torch.nn.functional.normalize(rand(*shape), dim=-1)

    total, row = n * groups, (groups, tokens, p)
    return MLPStep(
        w2=rand(total, p, p) * p**-0.5 * 3, w1=rand(total, p, p) * p**-0.5, s2=rand(total, p, p) * 0.01,
        s1=rand(total, p, p) * 0.01, keys=unit(*row), values=unit(*row), queries=unit(*row),
        eta=torch.rand(groups, tokens, dtype=torch.float64), mu=torch.rand(groups, tokens, dtype=torch.float64),
        **tables(groups, tokens)._asdict(), anchor2=rand(total, p, p) * 0.1, anchor1=rand(total, p, p) * 0.1,
    )  # fmt: skip


def gate_arguments(tokens, total=2 * HEADS, outs=1, ins=WIDTH):
    torch.manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    keys = torch.nn.functional.normalize(rand(total, tokens, ins), dim=-1)
    return Chunk(
        weight=rand(total, outs, ins), velocity=rand(total, outs, ins), products=rand(total, tokens, outs), keys=keys,
        writes=rand(total, tokens, outs), erase=torch.rand(total, tokens, dtype=torch.float64),
        **tables(total, tokens)._asdict(), queries=None, anchor=rand(total, outs, ins),
    )  # fmt: skip


def by_kernels(kind):
    if kind == "mlp":
        from nestling.memory.fused_kernels import mlp_step

        return mlp_step
    return lambda c, after: delta_chunk(c, after)


def prepare(kind, tokens, dtype, device):
    made = (mlp_arguments if kind == "mlp" else gate_arguments)(tokens)
    return type(made)(*(None if t is None else t.to(device, dtype).requires_grad_() for t in made))


def loss_of(outputs):
    return sum(
        (o * torch.linspace(-1, 1, o.numel(), dtype=o.dtype, device=o.device).view_as(o)).sum()
        for o in outputs
        if o is not None
    )


def use(precision, warps):
    from nestling.ops.triton import launch

    torch.set_float32_matmul_precision("highest" if precision == "tf32x3" else "high")
    launch.WARPS = warps


def compile_job(index: int) -> None:
    """Launch only some kernels of a step: the others are compiled by other processes at the same time."""
    kind, (tokens, precision, warps), part = JOBS[index]
    from nestling.ops.triton import inner, rule, rule_backward

    use(precision, warps)
    count, times = [0], {}

    class Only:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, **options):
                begin = time.perf_counter()
                if count[0] in part:
                    made = self.kernel[grid](*args, **options)
                    torch.cuda.synchronize()
                    times[f"{count[0]} {self.kernel.__name__}"] = dict(
                        seconds=round(time.perf_counter() - begin, 2), registers=getattr(made, "n_regs", None), spills=getattr(made, "n_spills", None),
                        shared_kib=made.metadata.shared // 1024,
                    )  # fmt: skip
                count[0] += 1

            return launch

    inner.inner_forward, inner.inner_backward = Only(inner.inner_forward), Only(inner.inner_backward)
    rule.chunk_forward, rule_backward.chunk_backward = Only(rule.chunk_forward), Only(rule_backward.chunk_backward)
    step = prepare(kind, tokens, torch.float32, DEVICE)
    loss_of(by_kernels(kind)(step, False)).backward()
    print(json.dumps(times))


def compile_all(folder: Path, seconds: float) -> list[dict]:
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


def check(kind, tokens, precision, warps) -> dict:
    use(precision, warps)
    want_step = prepare(kind, tokens, torch.float64, "cpu")
    reference = by_rule if kind == "mlp" else lambda c, after: chunk_reference(c, after)
    want = [o for o in reference(want_step, False) if o is not None]
    loss_of(want).backward()
    step = prepare(kind, tokens, torch.float32, DEVICE)
    got = [o for o in by_kernels(kind)(step, False) if o is not None]
    found = {f"output {i}": error(g, w) for i, (g, w) in enumerate(zip(got, want, strict=True))}
    loss_of(got).backward()
    for name, a, b in zip(step._fields, step, want_step, strict=True):
        if a is not None:
            triangle = name in ("decay", "mixed", "momentum")
            found[name] = error(a.grad.tril() if triangle else a.grad, b.grad.tril() if triangle else b.grad)
    return dict(worst=max(found.values()), errors=found)


def error(got, want):
    return ((got.double().cpu() - want).norm() / want.norm().clamp_min(1e-12)).item()


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


def time_step(kind, tokens, precision, warps) -> dict:
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


def time_layer(chunk, precision, with_kernels=True, tokens=4096, batch=4, profiled=False, graph=True) -> dict:
    use(precision, None)
    torch.manual_seed(0)
    layer = SelfModifyingTitans(16 * WIDTH, 16, chunk_size=chunk).cuda()
    x = torch.randn(batch, tokens, 16 * WIDTH, device="cuda", requires_grad=True)
    leaves = [x, *layer.parameters()]

    def both():
        with torch.autocast("cuda", torch.bfloat16):
            y, _ = layer(x)
        return torch.autograd.grad(y.float().square().mean(), leaves, allow_unused=True)

    found = {}
    with contextlib.nullcontext() if with_kernels else kernels.disabled():
        begin = time.perf_counter()
        both()
        torch.cuda.synchronize()
        found["first_s"] = time.perf_counter() - begin
        found["ms"] = milliseconds(both, 2) if found["first_s"] < 4 else None
        if profiled:
            found["profile"] = kernel_times(both)
        if graph:
            found["graph_ms"] = milliseconds(graphed(both), 3)
    return found


def attempt(found: dict, name: str, seconds: float, function, *args, **options) -> None:
    begin = time.time()
    try:
        with limit(seconds):
            found[name] = function(*args, **options)
    except Exception as problem:
        found[name] = dict(
            error=f"{type(problem).__name__}: {problem}"[-2500:], at=traceback.format_exc().splitlines()[-7:-1]
        )
    text = json.dumps(found[name])
    print(f"{name} [{time.time() - begin:.1f} s]: {text[:700]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--job", type=int)
    parser.add_argument("--seconds", type=float, default=88)
    options = parser.parse_args()
    if options.job is not None:
        compile_job(options.job)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    end, found = time.time() + options.seconds, {}
    found["compiled"] = compile_all(options.out, options.seconds * 0.6)
    for row in found["compiled"]:
        print(json.dumps(row)[:1200], flush=True)

    def save():
        (options.out / "kernels.json").write_text(json.dumps(found, indent=1))

    def go(name, *args, seconds=8.0, **more):
        left = end - time.time()
        if left < 2:
            found[name] = "left out, no time"
            return
        attempt(found, name, min(seconds, left), *args, **more)
        save()

    save()
    whole = {(row["job"][0], tuple(row["job"][1])) for row in found["compiled"] if "error" in row}
    settings = [(kind, c) for kind, all_of in (("mlp", MLP), ("gate", GATES)) for c in all_of if (kind, c) not in whole]
    first = [s for s in settings if s[1][0] == 64]
    for kind, c in first:
        go(f"check {kind} {c}", check, kind, *c)
    go("layer chunk 64, tf32x3", time_layer, 64, "tf32x3", seconds=15, profiled=True)
    go("layer chunk 64, tf32", time_layer, 64, "tf32", seconds=12)
    for kind, c in settings:
        go(f"time {kind} {c}", time_step, kind, *c)
    for kind, c in settings:
        if (kind, c) not in first:
            go(f"check {kind} {c}", check, kind, *c)
    for chunk, precision in ((32, "tf32x3"), (32, "tf32"), (16, "tf32x3")):
        go(f"layer chunk {chunk}, {precision}", time_layer, chunk, precision, seconds=15)
    go("layer chunk 64 without kernels", time_layer, 64, "tf32x3", False, seconds=12, graph=False)
    save()


if __name__ == "__main__":
    main()
