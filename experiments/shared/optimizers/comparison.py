"""Optimisers compared by training: each searches its learning rate, then runs every seed, at equal steps and time.

The search sees a held-out part of the training data; only the final runs see the test data. A seed decides initial
weights and batches, so that runs of one seed differ in the optimiser alone.
"""

from __future__ import annotations

import math
import statistics
import time
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from experiments.shared.optimizers.contenders import OptimizerContender, make
from experiments.shared.optimizers.search import propose
from experiments.shared.optimizers.study import OptimizerStudy, OptimizerWork
from experiments.shared.study import without_stages
from experiments.shared.work import Job, Progress, Row, curve
from nestling.training.config import ScheduleConfig, unknown
from nestling.training.schedules import lr_factor


@dataclass
class Model:
    """What is trained; `contenders` names the optimisers that train it (none: all), `options` are the model's.

    `equal_time`: run again with as many steps as fit into the time of the first contender's run.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    contenders: list[str] = field(default_factory=list)
    trials: int = 6
    steps: int = 400
    equal_time: bool = True


@dataclass
class Comparison(OptimizerStudy):
    """Numbers of the training and of the search. The first contender is the one others are compared with."""

    models: list[Model] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    search_seed: int = 100
    searched: list[str] = field(default_factory=list)  # who searches a rate (none: all); the others take the first's
    lr_low: float = 3e-4
    lr_high: float = 0.1
    batch_size: int = 64
    weight_decay: float = 0.05
    clip: float = 1.0
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    evaluations: int = 8  # of a run, for the curves
    curve_points: int = 40
    judged_on: ClassVar[str] = "test"  # of the final runs; "validation" where defaults are chosen by them

    def __post_init__(self) -> None:
        super().__post_init__()
        known = [c.name for c in self.contenders]
        for name in [n for m in self.models for n in m.contenders] + self.searched:
            if name not in known:
                raise ValueError(unknown("contender", name, known))

    def model(self, name: str) -> Model:
        """The model of that name."""
        return next(m for m in self.models if m.name == name)

    def decisive(self, job: ComparisonJob) -> dict[str, Any]:
        values = super().decisive(job)
        values["schedule"] = without_stages(values["schedule"])
        for name in ("models", "searched", "search_seed"):
            values.pop(name)
        model = self.model(job.model)
        values["model"] = [model.name, model.options, model.steps]
        if job.kind != "search":
            values.pop("lr_low"), values.pop("lr_high")
        return values


@dataclass(frozen=True)
class ComparisonJob(Job):
    """One training run: a trial of the search ("search"), a run that counts ("final"), one cut to equal time ("time").

    What follows from other results alone (`lr` of a trial, `steps` of a cut run) is no part of a job's name; the rate
    of the other runs is, since a longer search may choose another.
    """

    contender: str
    model: str
    kind: str
    seed: int
    lr: float = field(compare=False)
    steps: int = field(compare=False)
    trial: int = -1

    @property
    def key(self) -> str:
        what = f"trial {self.trial}" if self.kind == "search" else f"seed {self.seed} lr={self.lr:g}"
        return f"{self.model} {self.contender} {self.kind} {what}"


class Task(Protocol):
    """What is learned: models, batches and held-out data. `worst` is the loss of a blind guess."""

    worst: float

    def model(self, name: str) -> nn.Module:
        """A fresh model, from torch's random state."""

    def loss(self, model: nn.Module, step: int, seed: int) -> Tensor:
        """The mean loss of a batch."""

    def evaluate(self, model: nn.Module, part: str, quick: bool) -> dict[str, float]:
        """`loss` and what else is measured, on "train", "validation" or "test"; `quick`: on a part of it."""


def train(task: Task, settings: Comparison, job: ComparisonJob, progress: Progress | None = None) -> dict[str, Any]:
    """Train and evaluate; stops at a loss that is not finite. Seconds are of this thread's CPU time, per step."""
    torch.manual_seed(job.seed)
    model = task.model(job.model)
    optimizer = make(
        settings.contender(job.contender), model, job.lr, weight_decay=settings.weight_decay, steps=job.steps
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    part = "validation" if job.kind == "search" else settings.judged_on
    losses, evaluated, forward, update = [], [], [], []
    every = max(1, job.steps // settings.evaluations)
    for step in range(job.steps):
        factor = lr_factor(step, job.steps, settings.schedule)
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * factor
        begun = time.thread_time()
        optimizer.zero_grad()
        loss = task.loss(model, step, job.seed)
        loss.backward()
        if settings.clip:
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        middle = time.thread_time()
        optimizer.step()
        forward.append(middle - begun)
        update.append(time.thread_time() - middle)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        if progress:
            progress(step + 1, losses[-1])
        if job.kind != "search" and (step + 1) % every == 0 and step + 1 < job.steps:
            evaluated.append([step + 1, task.evaluate(model, part, True)])
    end = task.evaluate(model, part, False)
    failed = len(losses) < job.steps or not math.isfinite(end["loss"])
    tail = losses[-max(1, job.steps // 10) :]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "failed": failed,
        "worst": task.worst,
        "end": end,
        "train": task.evaluate(model, "train", True) if job.kind != "search" and not failed else None,
        "last_losses": statistics.fmean(tail),
        "curve": curve(losses, settings.curve_points),
        "evaluated": [*evaluated, [job.steps, end]],
        "model_seconds": statistics.median(forward),
        "optimizer_seconds": statistics.fmean(update[2:] or update),  # without the first, which make the state
    }


class ComparisonWork(OptimizerWork):
    """Trains; its kinds say on what (`task`)."""

    @abstractmethod
    def task(self) -> Task:
        """What is learned; made again in a worker process."""

    def run(self, job: ComparisonJob, progress: Progress | None) -> dict[str, Any]:
        return train(self.task(), self.settings, job, progress)

    def result(self, row: dict[str, Any]) -> str:
        return f"lr {row['lr']:g}, {'failed' if row['failed'] else format(row['end']['loss'], '.4f')}"


def trials(
    settings: Comparison, model: Model, contender: OptimizerContender, row: Row
) -> tuple[list[dict[str, Any]], ComparisonJob]:
    """The rows of the search so far, and the job of the trial after them."""
    found: list[dict[str, Any]] = []
    while True:
        job = ComparisonJob(contender.name, model.name, "search", settings.search_seed, 0.0, model.steps, len(found))
        known = row(job)
        if known is None or len(found) == model.trials:
            tried = tuple((r["lr"], _objective(r)) for r in found)
            lr = propose(tried, settings.lr_low, settings.lr_high) if len(found) < model.trials else 0.0
            return found, ComparisonJob(job.contender, job.model, "search", job.seed, lr, model.steps, job.trial)
        found.append(known)


def _objective(row: dict[str, Any]) -> float:
    """The validation loss; what failed counts as a blind guess."""
    return row["worst"] if row["failed"] else min(row["end"]["loss"], row["worst"])


def searcher(settings: Comparison, contender: OptimizerContender) -> OptimizerContender:
    """Whose search decides a contender's learning rate: its own or the first's."""
    own = not settings.searched or contender.name in settings.searched
    return contender if own else settings.contenders[0]


def best_lr(settings: Comparison, model: Model, contender: OptimizerContender, row: Row) -> float | None:
    """The best rate of a finished search, the contender's own or the one it takes over."""
    found, _ = trials(settings, model, searcher(settings, contender), row)
    if len(found) < model.trials:
        return None
    return min((_objective(r), r["lr"]) for r in found)[1]


def of_model(settings: Comparison, model: Model, contenders: list[OptimizerContender]) -> list[OptimizerContender]:
    """The contenders that train a model."""
    return [c for c in contenders if not model.contenders or c.name in model.contenders]


def plan(settings: Comparison, contenders: list[OptimizerContender], row: Row) -> list[ComparisonJob]:
    """What the results so far call for: searches first, then final runs seed by seed, then runs of equal time."""
    search, finals, timed = [], [], []
    for model in settings.models:
        chosen = of_model(settings, model, contenders)
        for name in dict.fromkeys(searcher(settings, c).name for c in chosen):
            found, job = trials(settings, model, settings.contender(name), row)
            search += [job] if len(found) < model.trials else []
        finals += [job for seed in settings.seeds for c in chosen if (job := final(settings, model, c, seed, row))]
        if model.equal_time:
            timed += [job for seed in settings.seeds for c in chosen if (job := cut(settings, model, c, seed, row))]
    return search + finals + timed


def final(
    settings: Comparison, model: Model, contender: OptimizerContender, seed: int, row: Row
) -> ComparisonJob | None:
    """A run that counts; None before its search has ended."""
    lr = best_lr(settings, model, contender, row)
    return None if lr is None else ComparisonJob(contender.name, model.name, "final", seed, lr, model.steps)


def cut(settings: Comparison, model: Model, contender: OptimizerContender, seed: int, row: Row) -> ComparisonJob | None:
    """The run with the steps that fit into the first contender's time; None while a final run is missing, and for the
    first contender itself."""
    seconds = step_seconds(settings, model, row)
    first = settings.contenders[0].name
    if contender.name == first or len(seconds) < len(of_model(settings, model, settings.contenders)):
        return None
    steps = max(1, int(model.steps * sum(seconds[first]) / sum(seconds[contender.name])))
    job = final(settings, model, contender, seed, row)
    return ComparisonJob(contender.name, model.name, "time", seed, job.lr, steps)


def step_seconds(settings: Comparison, model: Model, row: Row) -> dict[str, tuple[float, float]]:
    """(model, optimiser) seconds per step of each contender whose final runs are done. The model's share is the same
    work for all, so one figure, the median over all runs, stands for all."""
    rows = {}
    for contender in of_model(settings, model, settings.contenders):
        jobs = [final(settings, model, contender, seed, row) for seed in settings.seeds]
        found = [r for j in jobs if j and (r := row(j))]
        if len(found) == len(settings.seeds):
            rows[contender.name] = found
    if not rows:
        return {}
    common = statistics.median(r["model_seconds"] for found in rows.values() for r in found)
    return {name: (common, statistics.median(r["optimizer_seconds"] for r in found)) for name, found in rows.items()}
