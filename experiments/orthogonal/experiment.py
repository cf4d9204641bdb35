"""Least-squares tasks one after the other, in orthogonal or overlapping directions: what an optimiser's memory forgets
(NL Sec. 4.3, Eq. 45).

Task t draws inputs x = U_t z from a subspace of its own and wants W*_t x from a linear layer W. With orthogonal U_t the
gradients of different tasks lie in orthogonal directions, and one W solves all tasks exactly: plain gradient descent
then forgets nothing at all. Whatever is forgotten is the work of the optimiser: of momentum that still pushes along
the task before, of a preconditioner or an orthogonaliser that turns an update into directions its gradients never had.
With overlap the subspaces share a part, still linearly independent, so that one W solves all tasks, but gradients
of one task do move the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.shared.optimizers.contenders import M3, OptimizerContender, make
from experiments.shared.optimizers.study import OptimizerStudy, OptimizerWork
from experiments.shared.report import COLOURS, figure, markdown, pm, spread
from experiments.shared.work import Job, Progress, Row

GROUP = "Optimisers (no data)"
QUESTION = "What does an optimiser's memory forget between tasks (NL Eq. 45)?"
ENTRIES = "groups"  # of the summary


@dataclass
class Orthogonal(OptimizerStudy):
    """Sizes of the tasks, how much they overlap (the cosine between their directions), and the learning rates."""

    name: str = "orthogonal"
    overlaps: list[float] = field(default_factory=lambda: [0.0, 0.1, 0.3])
    inputs: int = 64
    outputs: int = 16
    rank: int = 8  # dimensions of one task
    tasks: int = 5
    steps: int = 150  # of one task
    batch: int = 16
    noise: float = 0.1  # of the targets, as a fraction of their size
    slowest: float = 0.3  # the smallest standard deviation of z; the largest is 1
    lrs: list[float] = field(default_factory=lambda: [round(10 ** (e / 3), 6) for e in range(-12, 1)])
    search_seeds: list[int] = field(default_factory=lambda: [100, 101])
    probes: list[int] = field(default_factory=lambda: [10, 50])  # steps into a task at which the update is looked at

    def smoke(self) -> Orthogonal:
        return self.changed(overlaps=[0.0, 0.1], tasks=2, steps=6, lrs=self.lrs[3::5], search_seeds=[100], seeds=[0, 1],
                            probes=[2, 4])  # fmt: skip

    def decisive(self, job: OrthogonalJob) -> dict[str, Any]:
        values = super().decisive(job)
        values.pop("overlaps")
        return values | {"seeds": self.seeds}


@dataclass(frozen=True)
class OrthogonalJob(Job):
    """One optimiser on sequences of one overlap, its state kept or dropped between tasks: the search and the runs."""

    contender: str
    overlap: float
    kept: bool
    kind: str = "sequence"

    @property
    def key(self) -> str:
        return f"{self.contender} overlap={self.overlap:g} state {'kept' if self.kept else 'dropped'}"


def defaults() -> Orthogonal:
    """The experiment's settings."""
    contenders = [
        OptimizerContender("SGD", "sgd"),
        OptimizerContender("momentum", "momentum"),
        OptimizerContender("momentum 0.99", "momentum", {"momentum": 0.99}),
        OptimizerContender("Adam", "adam"),
        OptimizerContender("Muon", "muon"),
        OptimizerContender("Delta Momentum", "delta momentum"),
        OptimizerContender("Delta Momentum 0.99", "delta momentum", {"momentum": 0.99, "erase": 1.0}),
        OptimizerContender("DMGD", "deep momentum"),
        OptimizerContender("M3", "m3", dict(M3)),
    ]
    return Orthogonal(contenders=contenders, seeds=[*range(8)])


@dataclass
class Sequence:
    """The tasks of one seed: bases U [t, i, k], scales of z [k], solutions W* [t, o, i], batches by (task, step)."""

    bases: Tensor
    scales: Tensor
    solutions: Tensor
    inputs: Tensor  # [t, s, i, b]
    targets: Tensor  # [t, s, o, b]

    @classmethod
    def draw(cls, settings: Orthogonal, overlap: float, seed: int) -> Sequence:
        """Directions of two tasks have the cosine `overlap`; every task's loss at W = 0 is 1."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        n, k, tasks = settings.inputs, settings.rank, settings.tasks
        directions = torch.linalg.qr(normal(n, n))[0][:, : (tasks + 1) * k].T.reshape(tasks + 1, k, n).mT
        bases = (1 - overlap) ** 0.5 * directions[1:] + overlap**0.5 * directions[0]
        scales = torch.logspace(0, torch.tensor(settings.slowest).log10(), k, dtype=torch.float64)
        solutions = normal(tasks, settings.outputs, n)
        zero = 0.5 * ((solutions @ bases) * scales).square().sum((1, 2), keepdim=True)
        solutions = solutions / zero.sqrt()
        shape = (tasks, settings.steps)
        inputs = bases[:, None] @ (scales[:, None] * normal(*shape, k, settings.batch))
        targets = solutions[:, None] @ inputs
        targets = targets + settings.noise * targets.std() * normal(*targets.shape)
        return cls(bases, scales, solutions, inputs.float(), targets.float())

    def losses(self, weight: Tensor) -> Tensor:
        """The expected loss without noise of every task [t], as a part of its loss at W = 0."""
        off = (weight.double() - self.solutions) @ self.bases * self.scales
        return 0.5 * off.square().sum((1, 2))


def learn(
    settings: Orthogonal, contender: OptimizerContender, job: OrthogonalJob, lr: float, seed: int
) -> dict[str, Any] | None:
    """Go through a sequence; None if it diverges.

    Returns `losses` [after task, of task], and `backward`: by steps into a task, the share of the squared update that
    lies in directions of earlier tasks alone.
    """
    sequence = Sequence.draw(settings, job.overlap, seed)
    torch.manual_seed(seed)
    layer = nn.Linear(settings.inputs, settings.outputs, bias=False)
    nn.init.zeros_(layer.weight)
    optimizer, losses = None, []
    backward: dict[int, list[float]] = {n: [] for n in settings.probes}
    for task in range(settings.tasks):
        if optimizer is None or not job.kept:
            optimizer = make(contender, layer, lr, steps=settings.tasks * settings.steps)
        earlier = _earlier(sequence.bases, task)
        for step in range(settings.steps):
            x, y = sequence.inputs[task, step], sequence.targets[task, step]
            before = layer.weight.detach().clone() if earlier is not None and step + 1 in backward else None
            layer.weight.grad = (layer.weight.detach() @ x - y) @ x.T / settings.batch
            optimizer.step()
            if before is not None:
                update = (layer.weight.detach() - before).double()
                size = update.square().sum()
                backward[step + 1].append(float((update @ earlier).square().sum() / size) if size > 0 else 0.0)
        found = sequence.losses(layer.weight.detach())
        if not bool((found < 1e4).all()):
            return None
        losses.append(found.tolist())
    return {"losses": losses, "backward": {str(n): sum(v) / max(1, len(v)) for n, v in backward.items()}}


def _earlier(bases: Tensor, task: int) -> Tensor | None:
    """An orthonormal basis [i, m] of the earlier tasks' directions without this task's."""
    if task == 0:
        return None
    past = bases[:task].mT.reshape(-1, bases.shape[1]).T
    own = bases[task]
    return torch.linalg.qr(past - own @ (own.T @ past))[0]


def measures(losses: list[list[float]]) -> dict[str, float]:
    """From losses [after task, of task]: at the end over all tasks, right after learning, and what was forgotten."""
    last, tasks = losses[-1], len(losses)
    learnt = [losses[t][t] for t in range(tasks)]
    return {
        "final": sum(last) / tasks,
        "learnt": sum(learnt) / tasks,
        "forgotten": sum(end - own for end, own in zip(last[:-1], learnt)) / max(1, tasks - 1),
    }


class OrthogonalWork(OptimizerWork):
    def run(self, job: OrthogonalJob, progress: Progress | None) -> dict[str, Any]:
        settings, contender = self.settings, self.settings.contender(job.contender)
        search = {}
        for place, lr in enumerate(settings.lrs):
            found = [learn(settings, contender, job, lr, seed) for seed in settings.search_seeds]
            usable = [measures(f["losses"])["final"] for f in found if f]
            search[lr] = sum(usable) / len(usable) if len(usable) == len(found) else None
            if progress:
                progress(place, search[lr] or float("nan"))
        tried = [(loss, lr) for lr, loss in search.items() if loss is not None]
        if not tried:
            return {"search": {f"{lr:g}": loss for lr, loss in search.items()}, "lr": None, "runs": []}
        lr = min(tried)[1]
        runs = [learn(settings, contender, job, lr, seed) for seed in settings.seeds]
        figures = [measures(r["losses"]) | {"losses": r["losses"], "backward": r["backward"]} for r in runs if r]
        return {"search": {f"{lr:g}": loss for lr, loss in search.items()}, "lr": lr, "runs": figures}

    def result(self, row: dict[str, Any]) -> str:
        return f"final {pm(spread(r['final'] for r in row['runs']))}, lr {row['lr']}"


def work(settings: Orthogonal, data: str | Path | None, smoke: bool) -> OrthogonalWork:
    """What does the jobs; nothing is read."""
    return OrthogonalWork(settings)


def plan(settings: Orthogonal, contenders: list[OptimizerContender], row: Row) -> list[OrthogonalJob]:
    """Every optimiser at every overlap, with its state kept and dropped."""
    return [OrthogonalJob(c.name, o, kept) for o in settings.overlaps for kept in (True, False) for c in contenders]


def summarize(settings: Orthogonal, contenders: list[OptimizerContender], row: Row) -> dict[str, Any]:
    """Means and spreads over seeds of every optimiser, overlap and treatment of the state."""
    groups = []
    for overlap in settings.overlaps:
        for contender in contenders:
            for kept in (True, False):
                found = row(OrthogonalJob(contender.name, overlap, kept))
                if not found:
                    continue
                runs, edge = found["runs"], found["lr"] in (settings.lrs[0], settings.lrs[-1])
                group = {"contender": contender.name, "overlap": overlap, "kept": kept, "lr": found["lr"]}
                group |= {"lr_at_edge": edge, "search": found["search"], "runs": len(runs)}
                group |= {k: spread(r[k] for r in runs) for k in ("final", "learnt", "forgotten")}
                group["backward"] = {str(n): spread(r["backward"][str(n)] for r in runs) for n in settings.probes}
                tasks = range(settings.tasks)
                group["curve"] = [[spread(r["losses"][after][of] for r in runs) for of in tasks] for after in tasks]
                groups.append(group)
    return {
        "experiment": "orthogonal",
        "overlaps": settings.overlaps,
        "tasks": settings.tasks,
        "steps": settings.steps,
        "seeds": len(settings.seeds),
        "probes": settings.probes,
        "groups": groups,
    }


def table(summary: dict[str, Any]) -> str:
    """The figures as Markdown, one table for each overlap."""
    first, last = summary["probes"][0], summary["probes"][-1]
    header = ["optimiser", "state", "lr", "loss at the end", "right after learning", "forgotten"]
    header += [f"update backward, step {n}" for n in (first, last)]
    text = ""
    for overlap in summary["overlaps"]:
        rows = []
        for g in summary["groups"]:
            if g["overlap"] == overlap:
                lr = "-" if g["lr"] is None else f"{g['lr']:.2g}" + ("*" if g["lr_at_edge"] else "")
                figures = [pm(g[k], 5) for k in ("final", "learnt", "forgotten")]
                shares = [pm(g["backward"][str(n)]) for n in (first, last)]
                rows.append([g["contender"], "kept" if g["kept"] else "dropped", lr, *figures, *shares])
        text += f"Directions of two tasks at a cosine of {overlap:g}:\n\n" + markdown(header, rows) + "\n"
    text += f"{summary['tasks']} tasks of {summary['steps']} steps, mean ± standard deviation over {summary['seeds']} "
    text += "sequences; the learning rate is the best on other sequences, for each row by itself. Losses are parts of "
    text += "the loss before learning. Forgotten: loss at the end minus loss right after learning, over all tasks but "
    text += "the last. Update backward: the share of the squared update, so many steps into a new task, that lies in "
    text += "directions of earlier tasks alone. State: kept or dropped between tasks.\n"
    if any(g["lr_at_edge"] for g in summary["groups"]):
        text += "\\* the best learning rate lies at the edge of the grid.\n"
    return text


def plot(summary: dict[str, Any], path: Path) -> None:
    """By optimiser, state kept and dropped: loss at the end, what was forgotten, and the update backward."""
    names = list(dict.fromkeys(g["contender"] for g in summary["groups"]))
    low, high, probe = summary["overlaps"][0], summary["overlaps"][-1], str(summary["probes"][0])
    panels = [
        (low, "final", f"Loss at the end, cosine {low:g}", "mean over all tasks"),
        (low, "forgotten", f"Forgotten, cosine {low:g}", "rise of the loss of earlier tasks"),
        (high, "forgotten", f"Forgotten, cosine {high:g}", "rise of the loss of earlier tasks"),
        (low, "backward", f"Update backward, step {probe}", "share of the squared update"),
    ]
    with figure(path, len(panels), (15.5, 1.4 + 0.36 * len(names)), sharey=True) as axes:
        for axis, (overlap, measure, title, label) in zip(axes, panels):
            for g in summary["groups"]:
                value = g["backward"][probe] if measure == "backward" else g[measure]
                if g["overlap"] == overlap and value:
                    place = names.index(g["contender"]) + (-0.18 if g["kept"] else 0.18)
                    axis.errorbar(value["mean"], place, xerr=value["std"], fmt="o", markersize=5, capsize=3,
                                  color=COLOURS[0] if g["kept"] else COLOURS[1])  # fmt: skip
            axis.axvline(0, color="0.5", linewidth=0.8)
            axis.set_xscale("symlog", linthresh=1e-3)
            negative = measure == "forgotten" and overlap == low
            ticks = [-0.1, 0, 0.001, 0.01, 0.1] if negative else [0, 0.001, 0.01, 0.1, 1]
            axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
            axis.set(title=title, xlabel=label)
            axis.minorticks_off()
            axis.set_xlim(left=-0.6 if negative else None)
        axes[0].set_yticks(range(len(names)), names)
        axes[0].invert_yaxis()
        for colour, label in zip(COLOURS, ("state kept", "state dropped")):
            axes[-1].plot([], [], "o", color=colour, label=label)
        axes[-1].legend(loc="upper left", bbox_to_anchor=(1.02, 1))
