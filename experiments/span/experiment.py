"""How many of the last gradients a momentum holds: half and 99% of its mass (NL Sec. 4.3), by impulse response.

The response is measured in the optimisers' own states. Two streams of gradients differ in the size of one gradient
alone; the difference of the memories is that gradient's weight, so many steps later. Delta Momentum's forgetting
depends on the gradients that follow, so it is measured with followers in the same direction and in orthogonal ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
QUESTION = "How many gradients does a momentum remember (NL Sec. 4.3)?"
ENTRIES = "groups"  # of the summary

SHARES = (0.5, 0.99)
SIZE = 4  # of the weight matrix


@dataclass
class Span(OptimizerStudy):
    """The decays, and the period of M3's slow scale."""

    name: str = "span"
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95, 0.98, 0.99, 0.995, 0.999])
    slow_betas: list[float] = field(default_factory=lambda: [0.9, 0.95, 0.98, 0.99])  # a slow scale takes period times
    period: int = 16

    def smoke(self) -> Span:
        return self.changed(betas=[0.7, 0.8], slow_betas=[0.7], period=4)

    def decisive(self, job: SpanJob) -> dict[str, Any]:
        return {"period": self.period}


@dataclass(frozen=True)
class SpanJob(Job):
    """One memory with one decay; `followers`: the later gradients' direction, "same" or "orthogonal"."""

    contender: str
    beta: float
    followers: str = "same"
    kind: str = "span"

    @property
    def key(self) -> str:
        return f"{self.contender} beta={self.beta:g} followers {self.followers}"


# contender -> how a decay is set, and which state is the memory
MEMORIES: dict[str, tuple[Callable[[float], dict[str, Any]], str]] = {
    "SGD momentum": (lambda beta: {"momentum": beta}, "momentum_buffer"),
    "Adam, first moment": (lambda beta: {"betas": [beta, 0.999]}, "exp_avg"),
    "M3, fast": (lambda beta: {"betas": [beta, 0.999, 0.9]}, "m1"),
    "M3, slow": (lambda beta: {"betas": [0.9, 0.999, beta]}, "m2"),
    "Delta Momentum": (lambda beta: {"momentum": beta}, "momentum"),
}
CHANGING = "Delta Momentum"  # whose decay depends on what follows


def defaults() -> Span:
    """The experiment's settings."""
    names = {"SGD momentum": "momentum", "Adam, first moment": "adam", "M3, fast": "m3", "M3, slow": "m3"}
    contenders = [OptimizerContender(name, optimizer) for name, optimizer in names.items()]
    return Span(contenders=[*contenders, OptimizerContender("Delta Momentum", "delta momentum")])


def formula(beta: float, share: float) -> float:
    """Gradients n with 1 - beta^n = share."""
    return math.log(1 - share) / math.log(beta)


def response(settings: Span, job: SpanJob, steps: int, phase: int = 0) -> list[float]:
    """The weight in the memory of the gradient of step `phase` (from 0) after each step from then on."""
    contender = settings.contender(job.contender)
    set_decay, name = MEMORIES[job.contender]
    options = contender.options | set_decay(job.beta)
    if contender.optimizer == "m3":
        options |= {"periods": [1, settings.period], "ns_steps": 1}  # what is read of the memories changes no memory
    impulse, other = torch.zeros(2, SIZE, SIZE)
    impulse[0, 0] = 1.0
    other[0 if job.followers == "same" else 1, 0 if job.followers == "same" else 1] = 1.0

    def memories(size: float) -> list[Tensor]:
        layer = nn.Linear(SIZE, SIZE, bias=False).double()
        optimizer = make(OptimizerContender(contender.name, contender.optimizer, options), layer, 1e-3, steps=steps)
        held = []
        for step in range(steps):
            layer.weight.grad = (size * impulse if step == phase else other).double()
            optimizer.step()
            if step >= phase:
                held.append(optimizer.state[layer.weight][name][0, 0].item())
        return held

    return [abs(large - small) for large, small in zip(memories(2.0), memories(1.0))]


def by_age(settings: Span, job: SpanJob, steps: int) -> list[float]:
    """The weight of the last gradient, the one before, ... in a memory that has just been updated, normalised to 1.

    A memory that moves every step answers with its impulse response; one that moves once per period holds, at the end
    of a period, every age in a phase of its own.
    """
    if job.contender != "M3, slow":
        weights = response(settings, job, steps)
    else:  # all gradients of a period weigh the same: the first and the last are measured
        period, weights = settings.period, []
        first, last = response(settings, job, steps), response(settings, job, steps, period - 1)
        for end in range(0, steps, period):
            if not math.isclose(first[end + period - 1], last[end], rel_tol=1e-6):
                raise ValueError(f"the gradients of one period weigh {first[end + period - 1]} and {last[end]}")
            weights += [last[end]] * period
    total = sum(weights)
    return [w / total for w in weights]


def span(weights: list[float], share: float) -> int:
    """Last gradients that hold at least a share of the mass."""
    mass = 0.0
    for number, weight in enumerate(weights, 1):
        mass += weight
        if mass >= share - 1e-9:
            return number
    return len(weights)


class SpanWork(OptimizerWork):
    def run(self, job: SpanJob, progress: Progress | None) -> dict[str, Any]:
        period = self.settings.period if job.contender == "M3, slow" else 1
        steps = period * math.ceil(formula(job.beta, 1 - 1e-6))  # all but a millionth of the mass
        weights = by_age(self.settings, job, steps)
        return {"spans": [span(weights, share) for share in SHARES], "steps": steps}

    def result(self, row: dict[str, Any]) -> str:
        return "half {}, 99% {}".format(*row["spans"])


def work(settings: Span, data: str | Path | None, smoke: bool) -> SpanWork:
    """What does the jobs; nothing is read."""
    return SpanWork(settings)


def plan(settings: Span, contenders: list[OptimizerContender], row: Row) -> list[SpanJob]:
    """Every memory with every decay; the one that looks at what follows also with orthogonal followers."""
    slow = {"M3, slow": settings.slow_betas}
    jobs = [SpanJob(c.name, beta) for c in contenders for beta in slow.get(c.name, settings.betas)]
    return jobs + [SpanJob(c.name, b, "orthogonal") for b in settings.betas for c in contenders if c.name == CHANGING]


def summarize(settings: Span, contenders: list[OptimizerContender], row: Row) -> dict[str, Any]:
    """Spans of every memory, decay and kind of followers, beside the formula's."""
    groups = []
    for job in plan(settings, contenders, row):
        if found := row(job):
            groups.append(
                {"contender": job.contender, "beta": job.beta, "followers": job.followers, "spans": found["spans"]}
            )
    return {
        "experiment": "span",
        "period": settings.period,
        "betas": settings.betas,
        "formula": [[formula(b, share) for share in SHARES] for b in settings.betas],
        "groups": groups,
    }


def _rows(summary: dict[str, Any]) -> dict[str, dict[float, list[int]]]:
    rows: dict[str, dict[float, list[int]]] = {}
    for g in summary["groups"]:
        name = f"M3, slow (period {summary['period']})" if g["contender"] == "M3, slow" else g["contender"]
        if g["contender"] == CHANGING:
            name += f", {g['followers']} direction" + ("s" if g["followers"] == "orthogonal" else "")
        rows.setdefault(name, {})[g["beta"]] = g["spans"]
    return rows


def table(summary: dict[str, Any]) -> str:
    """Gradients with 50% / 99% of the mass, a column for each decay, as Markdown."""
    header = ["memory", *(f"β = {b:g}" for b in summary["betas"])]
    lines = [["formula ln(1 - share) / ln β", *(f"{h:.1f} / {m:.1f}" for h, m in summary["formula"])]]
    for name, spans in _rows(summary).items():
        cells = ["{:,} / {:,}".format(*spans[b]) if b in spans else "-" for b in summary["betas"]]
        lines.append([name, *cells])
    note = "\nLast gradients that hold at least 50% / 99% of the memory's mass, measured in the optimiser's state. "
    note += "Delta Momentum: when later gradients point in the same direction, or in orthogonal ones.\n"
    return markdown(header, lines) + note


def plot(summary: dict[str, Any], path: Path) -> None:
    """Spans by decay, for half and for 99% of the mass; memories of equal spans share a line."""
    rows = _rows(summary)
    lines: dict[tuple, list[str]] = {}
    for name, spans in rows.items():
        lines.setdefault(tuple(sorted((b, *s) for b, s in spans.items())), []).append(name)
    with figure(path, 2, (12.5, 4.2), sharey=True) as axes:
        for which, (axis, title) in enumerate(zip(axes, ("Half of the mass", "99% of the mass"))):
            left = [1 - b for b in summary["betas"]]
            axis.plot(left, [f[which] for f in summary["formula"]], color="0.3", linestyle="--", label="formula")
            for (points, names), colour in zip(lines.items(), COLOURS):
                x, y = [1 - p[0] for p in points], [p[1 + which] for p in points]
                axis.plot(x, y, color=colour, marker="o", markersize=4, linewidth=1, label=" =\n".join(names))
            axis.set(xscale="log", yscale="log", xlabel="β", ylabel="last gradients", title=title)
            axis.set_xticks(left, [f"{b:g}" for b in summary["betas"]])
            axis.minorticks_off()
            axis.invert_xaxis()
        axes[-1].legend(loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=9)
