"""How things are timed: interleaved in one process, as medians, with the machine's state beside the figures."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nestling.ops import compiled


@dataclass(frozen=True)
class Settings:
    """What every part of the benchmark measures with.

    Attributes:
        dim, heads: width and heads of the layers compared.
        batch, tokens: of the named target.
        lengths: sequence lengths of the comparison with attention (one sequence at a time above `tokens`).
        loop_tokens: tokens of the chunk form against the token loop; the layer's loop takes `layer_loop_tokens`.
        positions: where decoding is timed, over `decode_tokens` tokens each.
        memory_lengths: sequence lengths of the memory measurement.
        repeats: rounds of each comparison, fewer (never less than one) where they would take longer than `seconds`.
        device, dtype: "cpu" or "cuda"; float32, or bfloat16 under autocast.
    """

    dim: int = 256
    heads: int = 4
    batch: int = 2
    tokens: int = 512
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384)
    loop_tokens: int = 2048
    layer_loop_tokens: int = 256
    positions: tuple[int, ...] = (1024, 8192, 65536)
    decode_tokens: int = 128
    memory_lengths: tuple[int, ...] = (2048, 4096, 8192, 16384)
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
    decode_tokens=8, memory_lengths=(64, 128), product=128, repeats=2, seconds=5.0, model_batch=1, model_tokens=64,
)  # fmt: skip


def clock(function: Callable[[], object], settings: Settings) -> float:
    """Seconds of one call."""
    settings.synchronize()
    start = time.perf_counter()
    function()
    settings.synchronize()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Timing:
    """Seconds of each contender in each round; round r of one ran right beside round r of the others."""

    seconds: dict[Hashable, list[float]]

    def median(self, name: Hashable) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, name: Hashable, base: Hashable) -> float:
        """How many times as fast `name` is as `base`: the median over rounds of base's time over its own."""
        return statistics.median(b / a for a, b in zip(self.seconds[name], self.seconds[base], strict=True))

    def spread(self, name: Hashable, base: Hashable) -> tuple[float, float]:
        """Smallest and largest ratio of any round."""
        ratios = [b / a for a, b in zip(self.seconds[name], self.seconds[base], strict=True)]
        return min(ratios), max(ratios)

    @property
    def rounds(self) -> int:
        return len(next(iter(self.seconds.values())))


def interleave(contenders: dict[str, Callable[[], object]], settings: Settings) -> Timing:
    """Time contenders in turn, A B A B ..., after one unmeasured round."""
    warm = sum(clock(run, settings) for run in contenders.values())
    rounds = max(1, min(settings.repeats, int(settings.seconds / max(warm, 1e-9))))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            seconds[name].append(clock(run, settings))
    return Timing(seconds)


def train_step(layer: nn.Module, x: Tensor, settings: Settings) -> Callable[[], None]:
    """A call that runs forward and backward once, gradients of input and parameters included."""
    x = x.clone().requires_grad_()

    def step() -> None:
        with settings.autocast():
            y = layer(x)
        y = y[0] if isinstance(y, tuple) else y
        y.float().square().mean().backward()
        layer.zero_grad(set_to_none=True)
        x.grad = None

    return step


def product_rate(settings: Settings) -> float:
    """Floating-point operations per second of a large matrix product on this machine, the best of several."""
    n = settings.product
    kind = torch.float32 if settings.dtype == "float32" else torch.bfloat16
    a, b = settings.random(n, n).to(kind), settings.random(n, n).to(kind)
    best = min(clock(lambda: a @ b, settings) for _ in range(3 + settings.repeats))
    return 2 * n**3 / best


def _in_place_product(self_shape, a_shape, b_shape, *args, out_shape=None, **kwargs) -> int:
    batch, rows, inner = a_shape
    return 2 * batch * rows * inner * b_shape[-1]


def _triangular(a_shape, b_shape, *args, out_shape=None, **kwargs) -> int:
    """n^2 multiply-adds per right-hand side, halved by the triangle."""
    total = 1
    for size in b_shape:
        total *= size
    return total * a_shape[-1]


def _causal_attention(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    """Scores and their product with the values, half of each masked away."""
    batch, heads, tokens, size = q_shape
    return 2 * batch * heads * tokens * k_shape[-2] * size


def _causal_attention_backward(grad_shape, q_shape, k_shape, *args, out_shape=None, **kwargs) -> int:
    """Scores anew, and the gradients of values, weights, queries and keys."""
    return 5 * _causal_attention(q_shape, k_shape, k_shape) // 2


def count_flops(function: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products (and triangular solves) of a call; a multiply-add is two."""
    aten = torch.ops.aten
    extra = {
        aten.baddbmm_: _in_place_product,
        aten.linalg_solve_triangular: _triangular,
        aten._scaled_dot_product_flash_attention_for_cpu: _causal_attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _causal_attention_backward,
    }
    # the compiled forms do the same products, but no counter sees them
    with compiled.disabled(), FlopCounterMode(display=False, custom_mapping=extra) as counter:
        function()
    return counter.get_total_flops()


def environment(settings: Settings) -> dict:
    """The machine and its load, for the record."""
    found = {
        "cpu": _cpu_name(),
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


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
