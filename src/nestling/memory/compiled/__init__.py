"""The fused chunk step in C++ for CPUs: the equations of memory/fused.py, one memory at a time.

Over whole batches every element-wise operation goes through main memory; here a memory's chunk stays in the cache from
its first product to its last. A test ties the two forms.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from nestling.memory.compiled.build import library, limit_blas_threads

__all__ = ["Saved", "backward", "forward", "is_available"]

_TYPES = {torch.float32: "float32", torch.float64: "float64"}
_pools: dict[int, ThreadPoolExecutor] = {}


class Saved(NamedTuple):
    """What the backward pass keeps; the names are those of `fused._Saved`."""

    pre: Tensor  # W2 [k; v], [N, 2C, h]
    error: Tensor  # [N, C, p]
    pulled: Tensor  # [N, C, h]
    out: Tensor  # [N, C, p]
    sizes: Tensor  # [N, 5, C]
    gram2: Tensor  # k k^T, [G, C, C]
    gram1: Tensor  # h h^T, [N, C, C]
    d2: Tensor  # [N, C, h]
    d1: Tensor  # [N, C, p]
    read: Tensor | None  # [G, C, h]


def is_available(weight: Tensor) -> bool:
    """Whether the compiled step takes memories like this one."""
    return weight.device.type == "cpu" and weight.dtype in _TYPES and library() is not None


def forward(step: NamedTuple, after: bool) -> tuple[tuple[Tensor | None, ...], Saved]:
    """Weights and velocities behind the chunk and the reads; `step` is a `fused.Step`."""
    total, hidden, inner = step.w2.shape
    groups, tokens, _ = step.keys.shape
    new = step.w2.new_empty
    read = None if step.queries is None else new(groups, tokens, hidden)
    saved = Saved(
        new(total, 2 * tokens, hidden), new(total, tokens, inner), new(total, tokens, hidden), new(total, tokens, inner),
        new(total, 5, tokens), new(groups, tokens, tokens), new(total, tokens, tokens), new(total, tokens, hidden),
        new(total, tokens, inner), read,
    )  # fmt: skip
    outputs = (*(None if w is None else torch.empty_like(w) for w in step[:4]), _like(step.queries))
    _run("forward", step, after, step, outputs, saved)
    return outputs, saved


def backward(step: NamedTuple, after: bool, saved: Saved, *grads: Tensor | None) -> list[Tensor | None]:
    """Gradients of every field of the step, from those of weights, velocities and reads."""
    grads = [None if g is None else g.contiguous() for g in grads]
    found = [_like(t) if i < 4 else None if t is None else torch.zeros_like(t) for i, t in enumerate(step)]
    if grads[4] is None:
        found[step._fields.index("queries")] = None
    _run("backward", step, after, step, saved, grads, found)
    return found


def _like(t: Tensor | None) -> Tensor | None:
    return None if t is None else torch.empty_like(t)


def _run(name: str, step: NamedTuple, after: bool, *parts) -> None:
    """Call the library, the heads shared out over torch's threads."""
    groups, tokens, inner = step.keys.shape
    function = getattr(library(), f"{name}_{_TYPES[step.w2.dtype]}")
    sizes = (step.w2.shape[0] // groups, groups, tokens, inner, step.w2.shape[1], int(after))
    pointers = [(ctypes.c_void_p * len(part))(*(None if t is None else t.data_ptr() for t in part)) for part in parts]
    arguments = ((ctypes.c_int64 * len(sizes))(*sizes), *pointers)
    threads = min(torch.get_num_threads(), groups)
    if threads == 1 and torch.get_num_threads() == 1:
        function(*arguments, ctypes.c_int64(0), ctypes.c_int64(groups))
        return
    if threads not in _pools:
        _pools[threads] = ThreadPoolExecutor(threads, "nestling-step", initializer=limit_blas_threads)
    bounds = [ctypes.c_int64(groups * i // threads) for i in range(threads + 1)]
    list(_pools[threads].map(lambda b: function(*arguments, *b), zip(bounds[:-1], bounds[1:], strict=True)))
