"""`python -m benchmarks.gpu_kernels.ahead`: kernels compiled for an H100 on a machine without one, and what they take.

Registers of a thread, bytes it spills and shared memory of a program, by Triton's compiler and its ptxas; with triton
installed (pip install 'nestling[gpu]') it runs anywhere and measures no time but the compiler's.
"""

from __future__ import annotations

import argparse
import re
import time
from contextlib import redirect_stdout
from io import StringIO

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nestling.ops.triton import inner, project, rule, rule_backward, whole

KERNELS = {
    "inner_forward": inner.inner_forward,
    "chunk_forward": rule.chunk_forward,
    "step_forward (whole)": whole.step_forward,
    "inner_backward": inner.inner_backward,
    "chunk_backward": rule_backward.chunk_backward,
    "step_backward (whole)": whole.step_backward,
    "project_forward": project.project_forward,
    "project_backward": project.project_backward,
}
NUMBERS = {"tokens", "inner", "width", "outs", "ins", "groups", "key_groups", "first_read", "total", "stride"}
NUMBERS |= {"table_stride"}


def build(kernel, chunk: int, head: int, precision: str, warps: int) -> dict[str, float | str]:
    """What ptxas says of a kernel of an MLP memory with momentum, anchor and reads."""
    flags = dict(
        C=chunk, I=head, O=head, H=head, LEVELS=chunk.bit_length() - 1, P=precision, MOVES=True, ANCHOR=True,
        ERASE=True, READ=True, AFTER=False, ACTIVE=True, EXTRA=False, ADD=False,
    )  # fmt: skip
    names = kernel.arg_names
    kinds = {n: "constexpr" if n in flags else "i32" if n in NUMBERS else "*fp32" for n in names}
    source = ASTSource(fn=kernel, signature=kinds, constexprs={n: flags[n] for n in names if n in flags})
    begun = time.time()
    knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
    with redirect_stdout(StringIO()) as log:
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": 1})
    said = log.getvalue()

    def number(pattern: str) -> int:
        found = re.search(pattern, said)
        return int(found[1]) if found else 0

    return dict(
        registers=number(r"Used (\d+) registers"), spilled=number(r"(\d+) bytes spill stores"),
        shared=made.metadata.shared / 1024, seconds=time.time() - begun,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", default="16,64")
    parser.add_argument("--heads", default="64")
    parser.add_argument("--precision", default="tf32", help="tf32, or tf32x3: three products for one of float32")
    parser.add_argument("--only", default="", help="kernels whose names hold this")
    given = parser.parse_args()
    print("| kernel | chunk | head | registers | bytes spilled by a thread | shared KiB | compiled in s |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for head in map(int, given.heads.split(",")):
        for chunk in map(int, given.chunks.split(",")):
            for name, kernel in KERNELS.items():
                if given.only in name:
                    found = build(kernel, chunk, head, given.precision, 8 if min(chunk, head) >= 64 else 4)
                    print(
                        f"| {name} | {chunk} | {head} | {found['registers']} | {found['spilled']:,} | "
                        f"{found['shared']:.0f} | {found['seconds']:.0f} |", flush=True,
                    )  # fmt: skip


if __name__ == "__main__":
    main()
