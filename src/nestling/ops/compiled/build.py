"""Compiles the C++ chunk forms once per machine and finds the BLAS that torch brings."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from nestling.utils.locks import sole_writer
from nestling.utils.places import user_cache

HERE = Path(__file__).parent
SOURCES = (
    "library.cpp",
    "conv.h",
    "step.h",
    "linear.h",
    "read.h",
    "chunk.h",
    "decay.h",
    "decode.h",
    "memory_step.h",
    "unit.h",
    "matrix.h",
)
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"]
FLAGS += ["-shared", "-fPIC"]
BLAS = ("sgemm_", "dgemm_")
ASKED = "NESTLING_COMPILED is 0"

log = logging.getLogger(__name__)


class Unavailable(Exception):
    """Why there is no compiled form here."""


@functools.cache
def native() -> ctypes.CDLL | None:
    """The compiled chunk forms, or None where there is no compiler, no BLAS to call, or NESTLING_COMPILED=0."""
    try:
        return _load()
    except (Unavailable, OSError) as reason:
        level = logging.INFO if str(reason) == ASKED else logging.WARNING  # a warning is a line on stderr
        log.log(level, "nestling: the chunk forms run in PyTorch, slower: %s (NESTLING_COMPILED=0: as wanted)", reason)
        return None


def reason() -> str:
    """Why `native` is None; empty where it is not."""
    try:
        _load()
    except (Unavailable, OSError) as error:
        return str(error)
    return ""


def library() -> Path:
    """Where the compiled forms lie, or will. Unavailable without a compiler."""
    return user_cache() / f"chunk-{_fingerprint()}.so"


def _load() -> ctypes.CDLL:
    if os.environ.get("NESTLING_COMPILED", "1") == "0":
        raise Unavailable(ASKED)
    blas = _blas()
    path = library()
    if not path.exists():
        compile_to(path)
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError:  # damaged: it is derived data
        path.unlink()
        compile_to(path)
        loaded = ctypes.CDLL(str(path))
    loaded.use_blas(*(ctypes.cast(f, ctypes.c_void_p) for f in blas))
    return loaded


def _blas() -> list:
    """Matrix products in torch's own library, by their Fortran names."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not path.exists():
        raise Unavailable(f"no {path.name} to take matrix products from")
    loaded = ctypes.CDLL(str(path))
    missing = [name for name in BLAS if not hasattr(loaded, name)]
    if missing:
        raise Unavailable(f"{path.name} has no {', '.join(missing)}")
    return [getattr(loaded, name) for name in BLAS]


def limit_blas_threads() -> None:
    """Products called from this thread use one thread: the heads are what runs in parallel."""
    loaded = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    if hasattr(loaded, "MKL_Set_Num_Threads_Local"):
        loaded.MKL_Set_Num_Threads_Local(1)


def compile_to(path: Path) -> None:
    """Compile beside `path`, then move into place; of processes starting together one does, and the others wait."""
    with sole_writer(path, wait=True):
        if not path.exists():
            _compile(path)


def _compile(path: Path) -> None:
    compiler = _compiler()
    print("nestling: compiling the chunk form for this machine, once (some seconds)", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        aside = Path(folder) / path.name
        done = subprocess.run(
            [compiler, *FLAGS, str(HERE / SOURCES[0]), "-o", str(aside)],
            capture_output=True, text=True, errors="replace", env={**os.environ, "TMPDIR": folder},
        )  # fmt: skip
        if done.returncode:
            raise Unavailable(f"{compiler} failed: {done.stderr.strip()[-500:]}")
        aside.replace(path)


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and shutil.which(name):
            return name
    raise Unavailable("no C++ compiler (g++, c++, clang++ or $CXX)")


def _fingerprint() -> str:
    """Of what the library is made from and for: sources, flags, compiler, processor."""
    parts = [(HERE / name).read_bytes() for name in SOURCES]
    parts += [" ".join((_compiler(), *FLAGS)).encode(), platform.machine().encode()]
    cpu = Path("/proc/cpuinfo")
    if cpu.exists():
        lines = cpu.read_text().splitlines()
        parts += [line.encode() for line in lines if line.startswith(("model name", "flags", "Features"))][:2]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
