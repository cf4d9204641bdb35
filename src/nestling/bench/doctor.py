"""What this machine has, whether its fast forms equal their definitions, and where things lie."""

from __future__ import annotations

import importlib.util
import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from nestling.bench import correctness
from nestling.bench.settings import cpu_name
from nestling.ops import compiled, triton
from nestling.ops.compiled import build
from nestling.utils.places import cache_folder
from nestling.version import __version__

SINGLE = 1e-4  # float32 against float64: differences that a chunk's products round to, a hundred times over
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
EXTRAS = {
    "data": "text from the data sets of the hub",
    "tune": "nestling tune",
    "gguf": "models in .gguf files",
    "gpu": "Triton kernels",
    "eval": "translation scores",
    "track": "--track",
}


@dataclass(frozen=True)
class Check:
    """A fast form against its definition: the largest difference (None where it did not run), what is allowed, and a
    `note` on why it did not run."""

    name: str
    difference: float | None
    allowed: float
    agrees: bool
    note: str = ""


def examine() -> dict[str, Any]:
    """Everything `nestling doctor` shows, as JSON types; it takes some seconds."""
    checks = fast_forms()
    return {
        "agrees": all(check.agrees for check in checks),
        "machine": machine(),
        "checks": [asdict(check) for check in checks],
        "places": places(),
        "extras": extras(),
    }


def fast_forms() -> list[Check]:
    """The fast forms that run here, each against its definition."""
    known = correctness.comparisons()
    chunk = known["chunk form of the delta rule, read after, with momentum"]
    double, single = torch.float64, torch.float32
    found = []
    with compiled.disabled():
        found.append(_check("delta rule in chunks, PyTorch", chunk, correctness.TOLERANCE))
        found.append(_check("Titans, PyTorch", lambda: correctness.definition(double), correctness.TOLERANCE))
    names = {"delta rule in chunks, C++": chunk, "Titans, C++": lambda: correctness.definition(double)}
    why = "" if compiled.native() else build.reason()
    for name, run in names.items():
        found.append(_check(name, run, correctness.TOLERANCE, why))
    found.append(_check("Titans, C++, float32", lambda: correctness.definition(single), SINGLE, why))
    for form in ("plain", "gram"):
        run = known[f"{form} form of Newton-Schulz"]
        found.append(_check(f"Newton-Schulz, {form} form", run, correctness.TOLERANCE))
    found.append(_check("M3, all matrices at once", known["M3's batched step"], correctness.TOLERANCE))
    gpu = torch.cuda.is_available()
    if gpu:
        with triton.disabled():
            found.append(_check("Titans, GPU, float32", lambda: correctness.definition(single, "cuda"), SINGLE))
    on = os.environ.get("NESTLING_TRITON") == "1" and triton.INSTALLED
    why = "" if gpu and on else "off: NESTLING_TRITON=1 turns them on" if gpu else "no GPU"
    # layers of 64 channels a head are the narrowest they take at a chunk of 64
    wide = lambda: correctness.definition(single, "cuda", width=128)  # noqa: E731
    return [*found, _check("Titans, Triton kernels", wide, SINGLE, why)]


def _check(name: str, run: Callable[[], float], allowed: float, why_not: str = "") -> Check:
    if why_not:
        return Check(name, None, allowed, True, why_not)
    try:
        difference = float(run())
    except Exception as error:  # what should run and cannot is as wrong as what differs
        return Check(name, None, allowed, False, f"{type(error).__name__}: {error}")
    return Check(name, difference if math.isfinite(difference) else None, allowed, difference <= allowed)


def machine() -> dict[str, Any]:
    """Versions, processor, memory, compiler, linear algebra, GPUs."""
    blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    total, free = _memory()
    return {
        "nestling": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in LIBRARIES},
        "system": f"{platform.system()} {platform.release()}",
        "cpu": cpu_name(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "memory_bytes": total,
        "memory_free_bytes": free,
        "blas": blas[1] if blas else None,
        "compiler": _compiler(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
    }


def places() -> dict[str, Any]:
    """Where derived data, compiled forms and downloads lie, and what the disk there has left."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = cache_folder()
    there = next(p for p in (cache, *cache.absolute().parents) if p.exists())
    try:
        library = str(build.library())
    except (build.Unavailable, OSError):
        library = None
    return {
        "cache": str(cache),
        "cache_writable": os.access(there, os.W_OK),
        "cache_disk_free_bytes": shutil.disk_usage(there).free,
        "compiled": library,
        "downloads": HF_HUB_CACHE,
        "runs": "where --out says (runs/)",
        "states": "where --state says; while one is written, NAME.lock lies beside it",
    }


def extras() -> list[dict[str, Any]]:
    """The optional parts: what each is for, what of it is missing and the line that installs it."""
    try:
        needed = metadata.requires("nestling") or []
    except metadata.PackageNotFoundError:  # run from its sources
        needed = []
    found = []
    for extra, purpose in EXTRAS.items():
        names = [re.split(r"[^\w.-]", r)[0] for r in needed if re.search(rf"""extra == ['"]{extra}['"]""", r)]
        missing = [name for name in names if _version(name) is None]
        line = f"pip install 'nestling[{extra}]'"
        found.append({"extra": extra, "for": purpose, "missing": missing, "install": line if missing else None})
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "here" if importlib.util.find_spec(package.replace("-", "_")) else None


def _compiler() -> str | None:
    try:
        name = build._compiler()
        said = subprocess.run([name, "--version"], capture_output=True, text=True, errors="replace", timeout=10).stdout
    except (build.Unavailable, OSError, subprocess.SubprocessError):
        return None
    return said.splitlines()[0] if said else name


def _memory() -> tuple[int | None, int | None]:
    """Bytes of memory, and of those that can be had."""
    try:
        rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return tuple(int(rows[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return None, None
