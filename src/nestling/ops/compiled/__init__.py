"""The chunk forms in C++ for CPUs: the equations of ops/chunk.py and memory/fused.py, one memory at a time.

Over whole batches every element-wise operation goes through main memory; here a memory's chunk stays in the cache from
its first product to its last. Tests tie the forms. Compiled on first use; without a compiler PyTorch does the work.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from nestling.ops.compiled.build import limit_blas_threads, native

_TYPES = {torch.float32: "float32", torch.float64: "float64"}
_enabled = True
_pools: dict[int, ThreadPoolExecutor] = {}

Pointers = Sequence[Tensor | None]


def is_available(*tensors: Tensor | None) -> bool:
    """Whether the compiled forms take tensors like these: on a CPU, all float32 or all float64."""
    given = [t for t in tensors if t is not None]
    kinds = {(t.device.type, t.dtype) for t in given}
    ((device, kind), *others) = kinds
    return _enabled and not others and device == "cpu" and kind in _TYPES and native() is not None


def takes(kind: torch.dtype) -> bool:
    """Whether the compiled forms take tensors of this type on a CPU."""
    return _enabled and kind in _TYPES and native() is not None


@contextmanager
def disabled() -> Iterator[None]:
    """PyTorch does the work inside: for counting operations, and for comparing."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def run(name: str, kind: torch.dtype, sizes: Sequence[int], parts: Sequence[Pointers], count: int) -> None:
    """Call a function of the library on 0..count, shared out over torch's threads; tensors must be contiguous."""
    function = getattr(native(), f"{name}_{_TYPES[kind]}")
    pointers = [struct.pack(f"{len(part)}P", *[0 if t is None else t.data_ptr() for t in part]) for part in parts]
    arguments = (struct.pack(f"{len(sizes)}q", *sizes), *pointers)  # ctypes hands over where bytes lie
    if count <= 1 or torch.get_num_threads() == 1:
        function(*arguments, ctypes.c_int64(0), ctypes.c_int64(count))
        return
    threads = min(torch.get_num_threads(), count)
    if threads not in _pools:
        _pools[threads] = ThreadPoolExecutor(threads, "nestling-chunk", initializer=limit_blas_threads)
    bounds = [ctypes.c_int64(count * i // threads) for i in range(threads + 1)]
    list(_pools[threads].map(lambda ends: function(*arguments, *ends), list(zip(bounds[:-1], bounds[1:]))))
