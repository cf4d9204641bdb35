"""Fig. 4's surface: how many steps each optimiser needs down a curved valley (NL Eq. 53)."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.shared.optimizers.contenders import OptimizerContender, make
from experiments.shared.optimizers.study import OptimizerStudy, OptimizerWork
from experiments.shared.report import COLOURS, figure, markdown
from experiments.shared.work import Job, Progress, Row

GROUP = "Optimisers (no data)"
QUESTION = "Does Delta Momentum come down a curved valley sooner than momentum (NL Fig. 4)?"

FAR = 1e6  # a place this far from the valley has left it


@dataclass
class Surface(OptimizerStudy):
    """The surface psi(r, th) = r^2 + k (r - th + a sin(w r))^2, a family of (k, a, w), and the learning rates."""

    name: str = "surface"
    # the paper's start, and two beside it: a large step that happens to land in the valley is no skill
    starts: list[list[float]] = field(default_factory=lambda: [[-3.5, 2.0], [-3.6, 2.1], [-3.4, 1.9]])
    shown: list[float] = field(default_factory=lambda: [1.0, 0.5, 2.0])  # (k, a, w) of the figure
    stiffness: list[float] = field(default_factory=lambda: [1.0, 4.0, 16.0])  # k
    height: list[float] = field(default_factory=lambda: [0.5, 1.0])  # a
    waves: list[float] = field(default_factory=lambda: [1.0, 2.0, 3.0])  # w
    lrs: list[float] = field(default_factory=lambda: [round(10 ** (e / 3), 5) for e in range(-12, 4)])
    tolerance: float = 1e-3
    steps: int = 1000
    patience: int = 100  # steps it must stay below the tolerance

    def surfaces(self) -> list[tuple[float, float, float]]:
        """Every (k, a, w), the shown one first."""
        grid = itertools.product(self.stiffness, self.height, self.waves)
        return list(dict.fromkeys([tuple(self.shown), *grid]))

    def smoke(self) -> Surface:
        return self.changed(stiffness=[4.0], height=[1.0], waves=[1.0, 2.0], lrs=self.lrs[2::6], starts=self.starts[:1],
                            steps=60, patience=5, tolerance=1.0)  # fmt: skip

    def decisive(self, job: SurfaceJob) -> dict[str, Any]:
        values = super().decisive(job)
        return {name: values[name] for name in ("starts", "lrs", "tolerance", "steps", "patience")}


@dataclass(frozen=True)
class SurfaceJob(Job):
    """One optimiser on one surface, at every learning rate."""

    contender: str
    k: float
    a: float
    w: float
    kind: str = "descent"

    @property
    def key(self) -> str:
        return f"{self.contender} k={self.k:g} a={self.a:g} w={self.w:g}"


def defaults() -> Surface:
    """The experiment's settings."""
    names = {"SGD": "sgd", "momentum": "momentum", "Adam": "adam", "Delta Momentum": "delta momentum"}
    contenders = [OptimizerContender(name, optimizer) for name, optimizer in names.items()]
    contenders.append(OptimizerContender("Delta Momentum, erase 1", "delta momentum", {"erase": 1.0}))
    return Surface(contenders=contenders)


def value(r: Tensor, th: Tensor, k: float, a: float, w: float) -> Tensor:
    """psi(r, th) of NL Eq. 53, elementwise."""
    return r**2 + k * (r - th + a * torch.sin(w * r)) ** 2


def slope(r: float, th: float, k: float, a: float, w: float) -> tuple[float, float, float]:
    """(psi, dpsi/dr, dpsi/dth) in plain numbers: autograd would cost more than the optimisers that are compared."""
    off = r - th + a * math.sin(w * r)
    return r * r + k * off * off, 2 * r + 2 * k * off * (1 + a * w * math.cos(w * r)), -2 * k * off


class Point(nn.Module):
    """The place (r, th) as a model of one parameter."""

    def __init__(self, start: list[float]) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.tensor(start, dtype=torch.float64))


def descend(
    settings: Surface, job: SurfaceJob, lr: float, start: list[float], keep: bool = False
) -> tuple[int | None, list[list[float]]]:
    """(steps until psi stays below the tolerance, None if it never does; the way there if `keep`)."""
    point = Point(start)
    optimizer = make(settings.contender(job.contender), point, lr)
    place, way, outside = start, [start], 0
    for step in range(1, settings.steps + 1):
        point.place.grad = torch.tensor(slope(*place, job.k, job.a, job.w)[1:], dtype=torch.float64)
        optimizer.step()
        place = point.place.tolist()
        if keep:
            way.append(place)
        now = slope(*place, job.k, job.a, job.w)[0] if all(abs(x) < FAR for x in place) else math.inf
        if now >= settings.tolerance:
            outside = step
        if math.isinf(now) or step - outside >= settings.patience:
            break  # it left, or has stayed
    return (outside + 1 if step - outside >= settings.patience else None), way


class SurfaceWork(OptimizerWork):
    def run(self, job: SurfaceJob, progress: Progress | None) -> dict[str, Any]:
        taken = {lr: self._median(job, lr) for lr in self.settings.lrs}
        reached = [(steps, lr) for lr, steps in taken.items() if steps is not None]
        best, lr = min(reached, default=(None, None))
        return {"steps_by_lr": {f"{lr:g}": n for lr, n in taken.items()}, "best": best, "lr": lr}

    def _median(self, job: SurfaceJob, lr: float) -> int | None:
        """Steps from the middle one of the starts; None if half of them never arrive."""
        taken = [descend(self.settings, job, lr, start)[0] for start in self.settings.starts]
        middle = sorted(math.inf if n is None else n for n in taken)[len(taken) // 2]
        return None if math.isinf(middle) else int(middle)

    def result(self, row: dict[str, Any]) -> str:
        return f"{row['best']} steps"


def work(settings: Surface, data: str | Path | None, smoke: bool) -> SurfaceWork:
    """What does the jobs; nothing is read."""
    return SurfaceWork(settings)


def plan(settings: Surface, contenders: list[OptimizerContender], row: Row) -> list[SurfaceJob]:
    """Every optimiser on the shown surface, then on the family."""
    return [SurfaceJob(c.name, *surface) for surface in settings.surfaces() for c in contenders]


def summarize(settings: Surface, contenders: list[OptimizerContender], row: Row) -> dict[str, Any]:
    """Steps on the shown surface; over the family, how often each optimiser arrives, is first, and beats momentum."""
    found = {c.name: {s: r for s in settings.surfaces() if (r := row(SurfaceJob(c.name, *s)))} for c in contenders}
    complete = [s for s in settings.surfaces() if all(s in rows for rows in found.values())]
    reference = next((c.name for c in contenders if c.optimizer == "momentum"), contenders[0].name)
    least = {s: min((r[s]["best"] for r in found.values() if r[s]["best"]), default=None) for s in complete}

    def way(name: str, lr: float | None) -> list[list[float]]:
        shown = SurfaceJob(name, *settings.shown)
        return [] if lr is None else descend(settings, shown, lr, settings.starts[0], keep=True)[1]

    def figures(name: str) -> dict[str, Any]:
        rows = found[name]
        shown = rows.get(tuple(settings.shown), {})
        ratios = [
            rows[s]["best"] / found[reference][s]["best"]
            for s in complete
            if rows[s]["best"] and found[reference][s]["best"]
        ]
        lrs = [lr for lr in settings.lrs if (shown.get("steps_by_lr") or {}).get(f"{lr:g}")]
        within = [lr for lr in lrs if shown["steps_by_lr"][f"{lr:g}"] <= 2 * shown["best"]]
        return {
            "contender": name,
            "steps": shown.get("best"),
            "lr": shown.get("lr"),
            "lr_at_edge": shown.get("lr") in (settings.lrs[0], settings.lrs[-1]),
            "lr_width": max(within) / min(within) if within else None,  # best to twice its steps
            "way": way(name, shown.get("lr")),
            "steps_by_lr": shown.get("steps_by_lr", {}),
            "arrived": sum(rows[s]["best"] is not None for s in complete),
            "first": sum(least[s] is not None and rows[s]["best"] == least[s] for s in complete),
            "ratio": math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None,
            "ratio_range": [min(ratios), max(ratios)] if ratios else None,
            "by_surface": [[*s, rows[s]["best"]] for s in complete],
        }

    return {
        "experiment": "surface",
        "shown": settings.shown,
        "start": settings.starts[0],
        "tolerance": settings.tolerance,
        "steps": settings.steps,
        "surfaces": len(complete),
        "reference": reference,
        "lrs": settings.lrs,
        "contenders": [figures(name) for name, rows in found.items() if rows],
    }


def table(summary: dict[str, Any]) -> str:
    """The figures as Markdown."""
    k, a, w = summary["shown"]
    header = ["optimiser", "steps", "lr", "lr range", "arrives", "first", f"steps / {summary['reference']}", "range"]
    rows = []
    for c in summary["contenders"]:
        lr = "-" if c["lr"] is None else f"{c['lr']:g}" + ("*" if c["lr_at_edge"] else "")
        width = "-" if c["lr_width"] is None else f"{c['lr_width']:.0f}x"
        itself = c["ratio_range"] is None or c["contender"] == summary["reference"]
        spread = "-" if itself else "{:.2f} to {:.2f}".format(*c["ratio_range"])
        ratio = "-" if c["ratio"] is None else f"{c['ratio']:.2f}"
        steps = "not reached" if c["steps"] is None else str(c["steps"])
        of = summary["surfaces"]
        rows.append([c["contender"], steps, lr, width, f"{c['arrived']}/{of}", f"{c['first']}/{of}", ratio, spread])
    note = f"\nSteps, lr: at k = {k:g}, a = {a:g}, w = {w:g}, until psi stays below {summary['tolerance']:g} "
    note += f"(at most {summary['steps']}), the median of three neighbouring starts, at the best of "
    note += f"{len(summary['lrs'])} learning rates, the same for all. Lr range: from the smallest to the largest that "
    note += "needs at most twice the best's steps. Arrives, first, ratio (geometric mean, then its range): over "
    note += f"{summary['surfaces']} surfaces, each at its own best learning rate.\n"
    if any(c["lr_at_edge"] for c in summary["contenders"]):
        note += "\\* the best learning rate lies at the edge of the grid.\n"
    return markdown(header, rows) + note


def plot(summary: dict[str, Any], path: Path) -> None:
    """The ways down the shown surface, and the steps by learning rate."""
    k, a, w = summary["shown"]
    r, th = torch.meshgrid(torch.linspace(-4.3, 2.2, 300), torch.linspace(-4.2, 3.2, 300), indexing="ij")
    height = value(r, th, k, a, w)
    with figure(path, 2, (12, 5)) as (ways, steps):
        levels = [10 ** (e / 3) for e in range(-6, 10)]
        ways.contour(r, th, height.clamp(min=1e-3), levels=levels, colors="0.75", linewidths=0.7)
        for c, colour in zip(summary["contenders"], COLOURS):
            label = f"{c['contender']}: {c['steps'] or 'not reached'}"
            if c["way"]:
                x, y = zip(*c["way"])
                ways.plot(x, y, color=colour, linewidth=1.3, marker="o", markersize=2.5, label=label, alpha=0.85)
            points = [(float(lr), n) for lr, n in c["steps_by_lr"].items() if n]
            if points:
                steps.plot(*zip(*points), color=colour, marker="o", markersize=4, label=c["contender"])
        ways.plot([0], [0], marker="*", color="black", markersize=13, linestyle="")
        ways.plot(*[[v] for v in summary["start"]], marker="s", color="black", markersize=6, linestyle="")
        ways.set(xlabel="r", ylabel="θ", xlim=(-4.3, 2.2), ylim=(-4.2, 3.2))
        ways.set_title(f"k = {k:g}, a = {a:g}, w = {w:g}: steps from the square to the star")
        ways.legend(loc="lower left", frameon=True, framealpha=0.95, fontsize=9)
        ways.grid(False)
        from matplotlib.ticker import NullFormatter, ScalarFormatter

        steps.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="steps (only where it arrives)")
        steps.set_title(f"Steps until psi stays below {summary['tolerance']:g}")
        steps.set_yticks([n for n in (20, 50, 100, 200, 500, 1000) if n <= summary["steps"]])
        steps.yaxis.set_major_formatter(ScalarFormatter())
        steps.yaxis.set_minor_formatter(NullFormatter())
        steps.legend()
