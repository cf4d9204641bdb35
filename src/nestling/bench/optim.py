"""What a step of M3 costs beside Muon's and AdamW's: time, state, and the multiply-adds that have to run."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from unittest import mock

import torch
from torch import Tensor, nn

from nestling.bench import measure
from nestling.bench.measure import Timing
from nestling.bench.settings import BenchSettings
from nestling.bench.table import Table
from nestling.ops.orthogonalize import multiply_adds, orthogonalize_reference
from nestling.optim import M3
from nestling.training.muon import Muon

LAYERS, PERIOD = 12, 16  # of the target: a transformer of twice the benchmark's width, M3's default slow period
BASE = "torch.optim.Muon, float32"
LR = 1e-4

Shape = tuple[int, int]


def shapes(width: int) -> list[Shape]:
    """The matrices of one transformer layer: four projections of attention, and an MLP of four times the width."""
    return [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimiser that is timed.

    Attributes:
        make: from parameters.  products: multiply-adds of a step's products for a matrix of [rows, columns].
        period: one step in so many is a slow one, 0 for none; `to_slow_step(optimizer)` makes the next step one.
        around: the context its steps run in.
    """

    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    products: Callable[[int, int], float] = lambda rows, columns: 0.0
    period: int = 0
    to_slow_step: Callable[[torch.optim.Optimizer], None] | None = None
    around: Callable[[], object] = field(default=lambda: mock.patch.dict({}))


def optimizers(device: str) -> tuple[dict[str, OptimizerSpec], list[str]]:
    """Everything that is installed, by name, and a note on what is not."""
    cut = device == "cpu"
    plain = partial(multiply_adds, 5, form="plain")
    found = {
        "M3": OptimizerSpec(partial(M3, lr=LR), partial(multiply_adds, 5, cut=cut), PERIOD, _to_slow_step),
        "M3, polar_express_4": OptimizerSpec(
            partial(M3, lr=LR, ns_steps=4, coefficients="polar_express_4"),
            partial(multiply_adds, 4, coefficients="polar_express_4", cut=cut), PERIOD, _to_slow_step,
        ),
        BASE: OptimizerSpec(partial(torch.optim.Muon, lr=LR), plain, around=_muon_in_float32),
        "nestling.training.muon": OptimizerSpec(partial(Muon, lr=LR), partial(multiply_adds, 5, cut=cut)),
        "AdamW, fused": OptimizerSpec(partial(torch.optim.AdamW, lr=LR, fused=True)),
        "AdamW, foreach": OptimizerSpec(partial(torch.optim.AdamW, lr=LR, foreach=True)),
    }  # fmt: skip
    notes = []
    peers = {"AdaMuon (pytorch_optimizer), float32": _adamuon, "nested-learning M3, 5 steps": _nested_learning_m3}
    for name, build in peers.items():
        try:
            found[name] = build(plain)
        except ImportError as error:
            notes.append(f"{name}: skipped, {error.name or error} is not installed.")
    return found, notes


def _to_slow_step(optimizer: torch.optim.Optimizer) -> None:
    for state in optimizer.state.values():
        if isinstance(state["step"], Tensor):
            state["step"].fill_(PERIOD - 1)
        else:
            state["step"] = PERIOD - 1


@contextmanager
def _muon_in_float32() -> Iterator[None]:
    """torch's Muon orthogonalises in bfloat16, which is slow on a CPU: here the same loop in float32."""
    with mock.patch("torch.optim._muon._zeropower_via_newtonschulz", _newton_schulz):
        yield


def _newton_schulz(gradient: Tensor, triple: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """torch's loop for one matrix: three products a step, the sums fused into them."""
    (a, b, c), tall = triple, gradient.shape[0] > gradient.shape[1]
    x = gradient.T if tall else gradient
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _adamuon(products: Callable) -> OptimizerSpec:
    class AdaMuon(importlib.import_module("pytorch_optimizer").AdaMuon):
        @staticmethod
        def _orthogonalize(group: dict, updates: list[Tensor]) -> list[Tensor]:
            return [_newton_schulz(x, (3.4445, -4.7750, 2.0315), group["ns_steps"], 1e-7) for x in updates]

    return OptimizerSpec(lambda params: AdaMuon([{"params": params, "use_muon": True}], lr=LR, foreach=None), products)


def _nested_learning_m3(products: Callable) -> OptimizerSpec:
    """Its cubic step multiplies by X^T X, the columns' side, whichever is smaller: two products."""
    module = importlib.import_module("nested_learning.optim.m3")

    def iterated(rows: int, columns: int) -> float:
        return 5 * 2 * rows * columns**2

    return OptimizerSpec(partial(module.M3, lr=LR, ns_steps=5, slow_chunk=PERIOD), iterated, PERIOD, _to_slow_step)


class OptimizerRun:
    """An optimiser at work on the matrices of some layers."""

    def __init__(self, spec: OptimizerSpec, width: int, layers: int, device: str) -> None:
        torch.manual_seed(0)
        self.spec = spec
        self.params = [nn.Parameter(0.02 * torch.randn(s, device=device)) for _ in range(layers) for s in shapes(width)]
        for p in self.params:
            p.grad = torch.randn_like(p)
        self.optimizer = spec.make(self.params)
        self.step()

    def step(self) -> None:
        with self.spec.around():
            self.optimizer.step()

    def slow_step(self) -> None:
        self.spec.to_slow_step(self.optimizer)
        self.step()

    def state_bytes(self) -> float:
        """Bytes per parameter of tensors as large as their parameter."""
        tensors = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors if t.numel() > 1) / sum(p.numel() for p in self.params)


def time_steps(
    found: dict[str, OptimizerSpec], width: int, layers: int, settings: BenchSettings
) -> tuple[Timing, dict]:
    """Seconds of a step of `LAYERS` layers, measured on `layers` of them, averaged over a slow period."""
    runs = {name: OptimizerRun(spec, width, layers, settings.device) for name, spec in found.items()}
    steps = {(name, "plain"): run.step for name, run in runs.items()}
    steps |= {(name, "slow"): run.slow_step for name, run in runs.items() if run.spec.period}
    seconds = measure.interleave(steps, settings).seconds
    average = {}
    for name, run in runs.items():
        period = run.spec.period
        plain = seconds[name, "plain"]
        slow = seconds.get((name, "slow"), plain)
        average[name] = [
            LAYERS / layers * (p if not period else (p * (period - 1) + s) / period) for p, s in zip(plain, slow)
        ]
    return Timing(average), runs


def model_seconds(spec: OptimizerSpec, width: int, rate: float) -> tuple[float, float]:
    """(multiply-adds of a step of `LAYERS` layers, averaged over a slow period; their seconds at `rate` flop/s)."""
    total = LAYERS * sum(spec.products(*shape) for shape in shapes(width))
    total *= 1 + (1 / spec.period if spec.period else 0)
    return total, 2 * total / rate


def _rows(found: dict[str, OptimizerSpec], width: int, layers: int, settings: BenchSettings) -> list[dict]:
    rate = measure.product_rate(settings)
    timing, runs = time_steps(found, width, layers, settings)
    rate = max(rate, measure.product_rate(settings))
    rows = []
    for name, spec in found.items():
        count, ideal = model_seconds(spec, width, rate)
        row = {"optimizer": name, "width": width, "threads": torch.get_num_threads()} | _beside_muon(timing, name)
        row |= {"state bytes/parameter": runs[name].state_bytes(), "G multiply-adds": count / 1e9}
        rows.append(row | {"ms at the machine's rate": ideal * 1e3})
    return rows


def _beside_muon(timing: Timing, name: str) -> dict:
    low, high = timing.spread(BASE, name)
    return {
        "ms/step": timing.median(name) * 1e3,
        "times Muon": timing.ratio(BASE, name),
        "low": low,
        "high": high,
        "rounds": timing.rounds,
    }


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _thread_counts(settings: BenchSettings) -> list[int]:
    return [1, 2] if settings.device == "cpu" and (os.cpu_count() or 1) > 1 else [torch.get_num_threads()]


def optim(settings: BenchSettings) -> Table:
    """Every optimiser over the widths, on one and two threads, by a few layers of each."""
    s, rows = settings, []
    found, notes = optimizers(s.device)
    for width, layers in ((s.dim, 4), (2 * s.dim, 2), (4 * s.dim, 1)):
        for threads in _thread_counts(s):
            with _threads(threads):
                rows += _rows(found, width, layers, s)
    notes.append(
        f"{LAYERS} layers, scaled from 4, 2 and 1 of them; M3 averaged over a slow period of {PERIOD}. `times Muon` is "
        "the median over rounds of two times measured side by side; below 1 is faster. The cost model counts products."
    )
    return Table("A step of each optimiser, every matrix of a transformer", rows, notes)


def optim_target(settings: BenchSettings) -> Table:
    """All twelve layers at twice the benchmark's width: M3 against torch's Muon with the same Newton-Schulz steps."""
    s, rows = settings, []
    found = {name: c for name, c in optimizers(s.device)[0].items() if name in ("M3", "M3, polar_express_4", BASE)}
    for threads in _thread_counts(s):
        with _threads(threads):
            rows += _rows(found, 2 * s.dim, LAYERS, s)
    note = f"Nothing is scaled; {settings.dtype}, slow period {PERIOD}, five quintic steps unless named."
    return Table(f"M3 against Muon, {LAYERS} layers of width {2 * s.dim}", rows, [note])


def optim_bfloat16(settings: BenchSettings) -> Table:
    """torch.optim.Muon as shipped orthogonalises in bfloat16 on every device."""
    s = settings
    shipped = OptimizerSpec(partial(torch.optim.Muon, lr=LR))
    timing, _ = time_steps({BASE: optimizers(s.device)[0][BASE], "torch.optim.Muon, as shipped": shipped}, s.dim, 1, s)
    rows = [{"optimizer": name, "width": s.dim} | _beside_muon(timing, name) for name in timing.seconds]
    return Table("Muon's bfloat16 products on this device", rows, [f"{LAYERS} layers, scaled from one."])


def orthogonality(settings: BenchSettings) -> Table:
    """How near to 1 the singular values come, for Gaussian matrices of a layer's shapes."""
    rows = []
    for name, steps in (("muon", 5), ("polar_express", 5), ("polar_express_4", 4), ("cubic", 3)):
        for rows_, columns in ((2 * settings.dim, 2 * settings.dim), (2 * settings.dim, 8 * settings.dim)):
            matrix = torch.randn(rows_, columns, generator=torch.Generator().manual_seed(0))
            values = torch.linalg.svdvals(orthogonalize_reference(matrix, steps, coefficients=name))
            rows.append(
                {
                    "coefficients": name,
                    "steps": steps,
                    "shape": f"{rows_} x {columns}",
                    "rms distance to 1": float((values - 1).square().mean().sqrt()),
                    "median": float(values.median()),
                    "smallest": float(values.min()),
                    "largest": float(values.max()),
                }
            )
    note = "One Gaussian matrix of each shape; gradients of a trained network have more small singular values."
    return Table("Singular values after orthogonalisation", rows, [note])
