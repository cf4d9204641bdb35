"""The kernels' arithmetic on paper: `python -m benchmarks.kernel_arithmetic` prints the table of docs/kernels.md.

One MLP memory with momentum, decay towards an anchor and reads by one memory of three; head size p, hidden width p.
"""

from __future__ import annotations

from math import log2

TF32, PRODUCTS, HBM = 494e12, 3, 3.35e12  # an H100 SXM: dense tf32 per second, products for a float32 one, bytes
SHARED, REGISTERS, PROGRAMS = 227, 256, 132  # KiB of a multiprocessor, and multiprocessors
READING = 1 / 3


def operations(C: int, p: int, whole: bool = False) -> tuple[float, float]:
    """Of a memory's chunk, forward and backward; whole: in one program each way, which makes three products anew."""
    cpp, ccp, inverse = 2 * C * p * p, 2 * C * C * p, 2 * (log2(C) - 1) * 2 * C**3
    rule = 4 * cpp + 3 * ccp + inverse + READING * 3 * (cpp + ccp)
    back = 8 * cpp + 6 * ccp + READING * (6 * cpp + 7 * ccp)
    return 5 * cpp + 2 * rule, (13 if whole else 10) * cpp + 2 * back


def moved(C: int, p: int, whole: bool = False) -> tuple[float, float]:
    """Bytes read and written, each tensor of a kernel once."""
    if whole:  # states and anchors in, states out; keys, values, a third of the reads, what is kept; tables, inverses
        read, tables = 3 * READING * C * p, 3 * C * C
        forward = 10 * p * p + 6 * C * p + read + tables + 2 * C * C
        return 4.0 * forward, 4.0 * (16 * p * p + 8 * C * p + 4 / 3 * read + 4 * tables + 2 * C * C)
    return 4.0 * (12 * p * p + 18 * C * p + 6 * C * C), 4.0 * (22 * p * p + 28 * C * p + 16 * C * C)


def held(C: int, p: int) -> tuple[float, float]:
    """KiB of float32 tiles: the operands of the largest product, and what the backward rule keeps from step to step."""
    sides = sorted((C, C, p, p))
    return 4 * (sides[-1] * sides[-2] + sides[-1] * sides[-2]) / 1024, 4 * (4 * p * p + 5 * C * p + 2 * C * C) / 1024


def layer(
    C: int, p: int, whole: bool = False, width: int = 1024, tokens: int = 16384, stack: int = 3
) -> tuple[float, float]:
    """ms forward and backward of all MLP memories of a layer: bound by products, and by memory."""
    chunks = stack * (width // p) * tokens / C
    bounds = (operations, TF32 / PRODUCTS), (moved, HBM)
    return tuple(1e3 * chunks * sum(count(C, p, whole)) / rate for count, rate in bounds)


def table() -> list[str]:
    head = "chunk | head | MFLOP forward | backward | MiB moved | FLOP per byte"
    head += " | operands KiB | kept KiB | fits"
    rows = [f"| {head} | products ms | memory ms | whole: MiB | products ms | memory ms |", "|" + "---|" * 14]
    for p in (32, 64, 128):
        for C in (16, 32, 64, 128, 256):
            work, traffic, (operands, kept) = operations(C, p), moved(C, p), held(C, p)
            fits = "yes" if operands <= SHARED and kept <= REGISTERS else "spills" if operands <= SHARED else "no"
            bounds, whole = layer(C, p), (sum(moved(C, p, True)) / 2**20, *layer(C, p, True))
            figures = work[0] / 1e6, work[1] / 1e6, sum(traffic) / 2**20, sum(work) / sum(traffic), operands, kept
            cells = [f"{x:.{digits}f}" for x, digits in zip(figures, (1, 1, 2, 0, 0, 0), strict=True)]
            rows.append(
                f"| {C} | {p} | {' | '.join(cells)} | {fits} | {bounds[0]:.1f} | {bounds[1]:.1f} | "
                f"{whole[0]:.2f} | {whole[1]:.1f} | {whole[2]:.1f} |"
            )
    return rows


if __name__ == "__main__":
    print("\n".join(table()))
