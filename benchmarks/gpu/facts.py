"""The device, the versions, and the rates nothing on it can exceed, measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from typing import Any

import torch

from benchmarks.gpu.clock import device, milliseconds, on_gpu
from benchmarks.gpu.record import Record

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "huggingface_hub", "numpy", "flash-linear-attention")


def run(record: Record, options: dict[str, Any]) -> None:
    quick = options["quick"]
    record.attempt("device", "what", _device)
    record.attempt("device", "versions", _versions)
    size = 256 if quick else 8192
    record.attempt("rates", "bf16 product TFLOP/s", lambda: _product(size, torch.bfloat16, "highest"))
    record.attempt("rates", "float32 product TFLOP/s", lambda: _product(size // 2, torch.float32, "highest"))
    record.attempt("rates", "tf32 product TFLOP/s", lambda: _product(size // 2, torch.float32, "high"))
    torch.set_float32_matmul_precision("highest")
    record.attempt("rates", "copy TB/s", lambda: _copy(1e6 if quick else 2e9))
    record.attempt("rates", "one small operation, microseconds", lambda: _launch(100 if quick else 2000))


def _device() -> dict[str, Any]:
    found: dict[str, Any] = {"name": "CPU", "cores": os.cpu_count(), "machine": platform.machine()}
    if on_gpu():
        p = torch.cuda.get_device_properties(0)
        found |= {
            "name": p.name, "capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count,
            "GiB": p.total_memory / 2**30, "L2 MiB": p.L2_cache_size / 2**20, "cuda": torch.version.cuda,
            "bf16": torch.cuda.is_bf16_supported(),
        }  # fmt: skip
        asked = "driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw"
        command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
        try:
            found["driver, clocks, heat"] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        except OSError as error:
            found["driver, clocks, heat"] = str(error)
    return found


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch as built": torch.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def _product(size: int, kind: torch.dtype, precision: str) -> float:
    torch.set_float32_matmul_precision(precision)
    a, b = (torch.randn(size, size, device=device(), dtype=kind) for _ in range(2))
    time = milliseconds(lambda: a @ b, budget=0.5, most=30)
    return 2 * size**3 / time["ms"] / 1e9


def _copy(size: float) -> float:
    """Bytes read plus bytes written."""
    a = torch.randn(int(size) // 4, device=device())
    b = torch.empty_like(a)
    time = milliseconds(lambda: b.copy_(a), budget=0.3)
    total = 2 * a.numel() * 4
    return total / time["ms"] / 1e9


def _launch(count: int) -> float:
    """What Python and the launch cost where the work itself is nothing."""
    x = torch.zeros(8, device=device())

    def many() -> None:
        for _ in range(count):
            x.add_(1.0)

    return 1e3 * milliseconds(many, budget=0.2)["ms"] / count
