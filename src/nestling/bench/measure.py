"""How things are timed: interleaved in one process, as medians over rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nestling.bench.settings import BenchSettings


def clock(function: Callable[[], object], settings: BenchSettings) -> float:
    """Seconds of one call; on one thread of a CPU those of the processor, in which other work does not count."""
    alone = settings.device == "cpu" and torch.get_num_threads() == 1
    now = time.process_time if alone else time.perf_counter
    settings.synchronize()
    start = now()
    function()
    settings.synchronize()
    return now() - start


@dataclass(frozen=True)
class Timing:
    """Seconds of each call in each round; round r of one ran right beside round r of the others."""

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


def interleave(calls: dict[str, Callable[[], object]], settings: BenchSettings) -> Timing:
    """Time calls in turn, A B A B ..., after one unmeasured round."""
    warm = sum(clock(run, settings) for run in calls.values())
    rounds = max(1, min(settings.repeats, int(settings.seconds / max(warm, 1e-9))))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, run in calls.items():
            seconds[name].append(clock(run, settings))
    return Timing(seconds)


def train_step(layer: nn.Module, x: Tensor, settings: BenchSettings) -> Callable[[], None]:
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


def product_rate(settings: BenchSettings) -> float:
    """Floating-point operations per second of a large matrix product on this machine, the best of several."""
    n = settings.product
    kind = torch.float32 if settings.dtype == "float32" else torch.bfloat16
    a, b = settings.random(n, n).to(kind), settings.random(n, n).to(kind)
    best = min(clock(lambda: a @ b, settings) for _ in range(3 + settings.repeats))
    return 2 * n**3 / best
