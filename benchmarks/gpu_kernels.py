"""The Triton kernels on a GPU: right against float64, and how long they take, alone and in a layer.

`python3 -m benchmarks.gpu_kernels --out FOLDER`. Processes side by side compile the kernels, which are then taken from
Triton's cache.
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
from nestling.memory.fused_linear import linear_by_rule
from nestling.ops import triton as kernels
from nestling.ops.chunk import decay_table
from nestling.ops.compiled.linear import LinearStep

HEADS, STACK, WIDTH = 64, 3, 64  # 4 sequences of 16 heads; memories of k, v and the main one
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS = [(64, "tf32x3"), (64, "tf32"), (32, "tf32x3"), (16, "tf32x3")]
OTHER_WARPS = [(64, "tf32", 4), (64, "tf32x3", 4)]
# one process compiles one of the heavy kernels, or all the light ones of one direction
JOBS = [
    ("layer", (*c, None), part) for c in LAYERS for part in ("second", "first", "gate", "rule", "backward", "forward")
]
JOBS += [("mlp", c, part) for c in OTHER_WARPS for part in ("second", "first", "rule", "backward", "forward")]


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


def gate_arguments(tokens, n=2, groups=HEADS, outs=1, ins=WIDTH):
    torch.manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    keys, values = (torch.nn.functional.normalize(rand(groups, tokens, ins), dim=-1) for _ in range(2))
    total = n * groups
    return LinearStep(
        weight=rand(total, outs, ins), velocity=rand(total, outs, ins), keys=keys, values=values, queries=None,
        eta=torch.rand(groups, tokens, dtype=torch.float64), mu=torch.rand(groups, tokens, dtype=torch.float64),
        **tables(groups, tokens)._asdict(), anchor=rand(total, outs, ins),
    )  # fmt: skip


def by_kernels(kind):
    from nestling.memory.fused_kernels import linear_step, mlp_step

    return mlp_step if kind == "mlp" else linear_step


def prepare(kind, tokens, dtype, device, p=WIDTH):
    made = mlp_arguments(tokens, p=p) if kind == "mlp" else gate_arguments(tokens)
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


def check(kind, tokens, precision, warps=None, sides=(WIDTH,)) -> dict:
    use(precision, warps)
    want_step = prepare(kind, tokens, torch.float64, "cpu", sides[0])
    reference = by_rule if kind == "mlp" else linear_by_rule
    want = [o for o in reference(want_step, False) if o is not None]
    loss_of(want).backward()
    step = prepare(kind, tokens, torch.float32, DEVICE, sides[0])
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
    chunk, precision, with_kernels=True, tokens=4096, batch=4, profiled=False, graph=True, eager=True
) -> dict:
    """Forward and backward in bf16; chunk None is the softmax block. Times in ms."""
    use(precision, None)
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
        steps = (("ms", milliseconds, eager and found["first_s"] < 6), ("profile", kernel_times, profiled),
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


def layers_agree(chunk=64, tokens=300) -> dict:
    """A whole layer in float32 by the kernels and by PyTorch, against float64 by PyTorch on this GPU."""
    use("tf32x3", None)
    made = {}
    for name, dtype, on in (
        ("float64", torch.float64, False),
        ("plain", torch.float32, False),
        ("kernels", torch.float32, True),
    ):
        torch.manual_seed(0)
        layer = SelfModifyingTitans(4 * WIDTH, 4, chunk_size=chunk).cuda().to(dtype)
        x = torch.randn(2, tokens, 4 * WIDTH).cuda().to(dtype).requires_grad_()
        with contextlib.nullcontext() if on else kernels.disabled():
            y, _ = layer(x)
            made[name] = [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]
    return {
        name: max(error(g, w.cpu()) for g, w in zip(made[name], made["float64"], strict=True))
        for name in ("plain", "kernels")
    }


def attempt(found: dict, name: str, seconds: float, function, *args, **options) -> None:
    begin = time.time()
    try:
        with limit(seconds):
            found[name] = function(*args, **options)
    except Exception as problem:
        found[name] = dict(
            error=f"{type(problem).__name__}: {problem}"[-6000:], at=traceback.format_exc().splitlines()[-7:-1]
        )
    text = json.dumps(found[name])
    print(f"{name} [{time.time() - begin:.1f} s]: {text[:700]}", flush=True)


def main() -> None:
    os.environ["NESTLING_TRITON"] = "1"
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--job", type=int)
    parser.add_argument("--item")
    parser.add_argument("--seconds", type=float, default=170)
    options = parser.parse_args()
    if options.job is not None:
        compile_job(options.job)
        return
    if options.item is not None:
        run_item(options.item)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    end, found = time.time() + options.seconds, {}
    found["compiled"] = compile_all(options.out, options.seconds * 0.5)
    for row in found["compiled"]:
        print(json.dumps(row)[:1200], flush=True)

    def save():
        (options.out / "kernels.json").write_text(json.dumps(found, indent=1))

    save()
    for name, (_, _, seconds) in items().items():  # a process for each: an illegal access ends all work of its process
        left = end - time.time()
        if left < 8:
            found[name] = "left out, no time"
            continue
        command = [sys.executable, "-m", "benchmarks.gpu_kernels", "--item", name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=min(seconds + 12, left))
            made = done.stdout.splitlines()
            found[name] = json.loads(made[-1]) if made else dict(error=done.stderr[-6000:], rc=done.returncode)
        except subprocess.TimeoutExpired:
            found[name] = dict(error="took too long")
        print(f"{name}: {json.dumps(found[name])[:700]}", flush=True)
        save()
    save()


def items() -> dict[str, tuple]:
    """What is measured, the most informative first: function, arguments, seconds."""
    chunk, x3, one = 64, "tf32x3", "tf32"
    found = {f"check mlp {c} {p}": (check, dict(kind="mlp", tokens=c, precision=p), 15) for c, p in LAYERS}
    found |= {f"check linear {c} {p}": (check, dict(kind="linear", tokens=c, precision=p), 15) for c, p in LAYERS}
    # narrow layers beyond 32 tokens are refused (`kernels.NARROW`) until one of these says why they failed
    for warps in (4, 8):
        options = dict(kind="linear", tokens=chunk, precision=x3, warps=warps, narrow=1)
        found[f"check linear {chunk} {x3}, narrow, {warps} warps"] = check, options, 20
    found["layers agree"] = layers_agree, {}, 20
    found["block, batch 4"] = time_layer, dict(chunk=None, precision=one), 10
    for c, p in LAYERS:
        found[f"layer chunk {c}, {p}, batch 4"] = time_layer, dict(chunk=c, precision=p, profiled=c == chunk), 20
    found["block, batch 1"] = time_layer, dict(chunk=None, precision=one, batch=1), 10
    for p in (x3, one):
        found[f"layer chunk 64, {p}, batch 1"] = time_layer, dict(chunk=chunk, precision=p, batch=1), 15
    found["layer chunk 64 without kernels, batch 4"] = (
        time_layer, dict(chunk=chunk, precision=x3, with_kernels=False), 20,
    )  # fmt: skip
    for c, p in LAYERS:
        found[f"time mlp {c} {p}"] = time_step, dict(kind="mlp", tokens=c, precision=p), 10
    for c, p, warps in OTHER_WARPS:
        found[f"time mlp {c} {p}, {warps} warps"] = time_step, dict(kind="mlp", tokens=c, precision=p, warps=warps), 20
    for c, *sides in ((37, 64, 64), (64, 128, 128), (128, 64, 64)):
        options = dict(kind="mlp", tokens=c, precision=x3, sides=sides)
        found[f"check mlp of {c} tokens, sides {sides}"] = check, options, 40
    return found


def run_item(name: str) -> None:
    function, options, seconds = items()[name]
    kernels.NARROW = options.pop("narrow", kernels.NARROW)
    found: dict = {}
    with contextlib.redirect_stdout(sys.stderr):
        attempt(found, name, seconds, function, **options)
    print(json.dumps(found[name]), flush=True)


if __name__ == "__main__":
    main()
