"""Sizes, repeats and device of a benchmark, and the machine it ran on."""

from __future__ import annotations

import os
import platform
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BenchSettings:
    """What every part of the benchmark measures with.

    Attributes:
        dim, heads: width and heads of the layers compared.
        batch, tokens: of the named target.
        lengths: sequence lengths of the comparison with attention (one sequence at a time above `tokens`).
        loop_tokens: tokens of the chunk form against the token loop; the layer's loop takes `layer_loop_tokens`.
        positions: where decoding is timed, over `decode_tokens` tokens each.
        decode_models: sizes of whole models that are timed at the first position.
        memory_lengths: sequence lengths of the memory measurement.
        product: side of the matrix product that says what the machine can do.
        repeats: rounds of each comparison, fewer (never less than one) where they would take longer than `seconds`.
        device, dtype: "cpu" or "cuda"; float32, or bfloat16 under autocast.
        model, model_batch, model_tokens: a size of `nestling.models.sizes` to measure whole, and its batch.
    """

    dim: int = 256
    heads: int = 4
    batch: int = 2
    tokens: int = 512
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384)
    loop_tokens: int = 2048
    layer_loop_tokens: int = 256
    positions: tuple[int, ...] = (1024, 8192, 65536, 1_048_576)
    decode_tokens: int = 128
    decode_models: tuple[str, ...] = ("tiny", "10m")
    memory_lengths: tuple[int, ...] = (8192, 16384, 32768)
    product: int = 1024
    repeats: int = 7
    seconds: float = 30.0
    device: str = "cpu"
    dtype: str = "float32"
    model: str | None = None
    model_batch: int = 8
    model_tokens: int = 2048

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, not {self.dtype!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda, but torch finds none; leave --device out to measure on the CPU")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, not {self.device!r}")
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, not {self.repeats}")

    def autocast(self):
        """The context forward passes run in."""
        return nullcontext() if self.dtype == "float32" else torch.autocast(self.device, torch.bfloat16)

    def synchronize(self) -> None:
        """Wait for the device, so that a clock around a call measures the call."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device)


QUICK = dict(
    dim=32, heads=2, tokens=64, lengths=(64, 128), loop_tokens=64, layer_loop_tokens=24, positions=(64, 256),
    decode_tokens=8, decode_models=("tiny",), memory_lengths=(64, 128), product=128, repeats=2, seconds=5.0,
    model_batch=1, model_tokens=64,
)  # fmt: skip


def environment(settings: BenchSettings) -> dict:
    """The machine and its load, for the record."""
    found = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": settings.device,
        "dtype": settings.dtype,
        "date": time.strftime("%Y-%m-%d"),
    }
    if settings.device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def cpu_name() -> str:
    """The processor as the system calls it."""
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
