"""`python3 -m benchmarks.gpu_kernels --out FOLDER`: compile, then run each item in a process of its own."""

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

from benchmarks.gpu_kernels import timing
from benchmarks.gpu_kernels.checks import check, layers_agree
from benchmarks.gpu_kernels.compiling import LAYERS, OTHER_WARPS, compile_all, compile_job
from benchmarks.gpu_kernels.timing import TookTooLong, time_layer, time_step
from nestling.ops import triton as kernels


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
    parser.add_argument("--go", type=Path, help="compile the item, and time it when this file is there")
    parser.add_argument("--seconds", type=float, default=170)
    options = parser.parse_args()
    if options.job is not None:
        compile_job(options.job)
        return
    if options.item is not None:
        run_item(options.item, options.go)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    end, found = time.time() + options.seconds, {}
    found["compiled"] = compile_all(options.seconds * 0.5)
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
        found[f"check linear {chunk} {x3}, narrow, {warps} warps"] = check, options, 60
    found["layers agree"] = layers_agree, {}, 60
    found["block, batch 4"] = time_layer, dict(chunk=None, precision=one), 10
    for c, p in LAYERS:
        found[f"layer chunk {c}, {p}, batch 4"] = time_layer, dict(chunk=c, precision=p, profiled=c == chunk), 20
    for c in (chunk, 32, 16):  # a chunk in one program each way, beside the forms above
        found[f"check whole {c} {one}"] = check, dict(kind="whole", tokens=c, precision=one), 120
        found[f"time whole {c} {one}"] = time_step, dict(kind="whole", tokens=c, precision=one), 60
    options = dict(chunk=chunk, precision=one, whole=True, profiled=True)
    found[f"layer chunk {chunk}, {one}, whole, batch 4"] = time_layer, options, 120
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


def run_item(name: str, go: Path | None = None) -> None:
    function, options, seconds = items()[name]
    timing.go, seconds = go, seconds if go is None else 600
    kernels.NARROW = options.pop("narrow", kernels.NARROW)
    found: dict = {}
    with contextlib.redirect_stdout(sys.stderr):
        attempt(found, name, seconds, function, **options)
    print(json.dumps(found[name]), flush=True)


if __name__ == "__main__":
    main()
