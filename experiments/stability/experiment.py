"""Stability: many steps at high learning rates, in float32 and bf16, with large memories.

A run that diverges is repeated with a Transformer of the same size, seed, learning rate and precision: what the
Transformer does not show as well is the memory's fault.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.shared.models.runs import TrainingWork
from experiments.shared.models.study import ModelContender, TrainingJob, TrainingStudy
from experiments.shared.report import COLOURS, figure, markdown, mean_curve, pm, spread
from experiments.shared.work import Row

GROUP = "Models"
QUESTION = "Does training at a high learning rate stay stable, in float32 and bf16?"
ENTRIES = "groups"  # of the summary


def defaults() -> TrainingStudy:
    """The experiment's settings."""
    return TrainingStudy.from_dict(
        {
            "name": "stability",
            "steps": 2000,
            "model": {
                "name": "tiny",
                "options": {
                    "hidden_size": 32,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "mixer_options": {"expansion": 4, "chunk_size": 64},
                },
            },
            "data": {"seq_len": 128, "batch_size": 1},
            "optim": {"name": "adamw"},
            "lrs": [1e-2],
            "schedule": {"name": "constant"},  # never falls: the hardest case
            "seeds": [0, 1, 2, 3, 4],
            "precisions": ["float32", "bf16"],
            "long_context": 16,
            "eval_windows": 32,
            "contenders": [
                {"name": "hope", "options": {"expansion": 4, "chunk_size": 64}},
                {"name": "transformer", "mixer": "attention"},
            ],
        }
    )


def _jobs(experiment: TrainingStudy, contender: ModelContender) -> list[TrainingJob]:
    seeds = experiment.seeds if contender.seeds is None else contender.seeds
    grid = [(lr, p) for lr in experiment.lrs for p in experiment.precisions]
    return [TrainingJob(contender.name, lr, seed, precision) for lr, precision in grid for seed in seeds]


def work(experiment: TrainingStudy, data: str | Path | None, smoke: bool) -> TrainingWork:
    """What trains, on the text files of `data`."""
    return TrainingWork(experiment, data, smoke)


def plan(experiment: TrainingStudy, contenders: list[ModelContender], row: Row) -> list[TrainingJob]:
    """All runs of every contender but the last, then the last contender where one of them diverged."""
    *tried, control = experiment.contenders
    jobs = [job for c in tried if c in contenders for job in _jobs(experiment, c)]
    if control in contenders:
        diverged = [job for job in jobs if (r := row(job)) and r["diverged"]]
        jobs += [TrainingJob(control.name, j.lr, j.seed, j.precision) for j in diverged]
    return list(dict.fromkeys(jobs))


def summarize(experiment: TrainingStudy, contenders: list[ModelContender], row: Row) -> dict[str, Any]:
    """Counts for each contender, learning rate and precision."""
    control, groups = experiment.contenders[-1], []
    for contender in contenders:
        for lr in experiment.lrs:
            for precision in experiment.precisions:
                jobs = [j for j in _jobs(experiment, contender) if (j.lr, j.precision) == (lr, precision)]
                found = [(j, r) for j in jobs if (r := row(j))]
                if found:
                    groups.append(_group(found, control, row) | {"contender": contender.name, "lr": lr})
    tried = [g for g in groups if g["contender"] != control.name]
    return {
        "experiment": "stability",
        "steps": experiment.steps,
        "tokens_per_step": experiment.tokens_per_step,
        "long_context": experiment.long_context * experiment.data.seq_len,
        "nan_losses": sum(g["nan_losses"] for g in tried),
        "diverged": sum(len(g["diverged_seeds"]) for g in tried),
        "diverged_alone": sum(len(g["diverged_alone"]) for g in tried),
        "groups": groups,
    }


def _group(found: list[tuple[TrainingJob, dict[str, Any]]], control: ModelContender, row: Row) -> dict[str, Any]:
    rows = [r for _, r in found]
    diverged = [j for j, r in found if r["diverged"]]
    same = {j.seed: row(TrainingJob(control.name, j.lr, j.seed, j.precision)) for j in diverged}
    far = [r.get("long_context") for r in rows]
    return {
        "precision": found[0][0].precision,
        "runs": len(rows),
        "parameters": rows[0]["parameters"],
        "nan_losses": sum(r["nan_losses"] for r in rows),
        "skipped": sum(r["skipped"] for r in rows),
        "diverged_seeds": [j.seed for j in diverged],
        "diverged_alone": [seed for seed, r in same.items() if r and not r["diverged"]],
        "rise": spread(_rise(r) for r in rows),
        "tails": spread(r["bits_per_byte"] for r in rows),
        "long": spread(f["bits_per_byte"] for f in far if f),
        "curves": [mean_curve([r], 1) for r in rows],
    }


def _rise(row: dict[str, Any]) -> float | None:
    """How far the loss ended above its best mean, in nats."""
    if row["last_loss"] is None or row["best_loss"] is None:
        return None
    return row["last_loss"] - row["best_loss"]


def table(summary: dict[str, Any]) -> str:
    """The figures as Markdown."""
    header = ["model", "lr", "precision", "runs", "NaN losses", "skipped steps", "diverged", "Transformer did not"]
    header += ["rise over best (nats)", "bits per byte", f"at {summary['long_context']:,} tokens"]
    rows = []
    for g in summary["groups"]:
        counts = [g["runs"], g["nan_losses"], g["skipped"], len(g["diverged_seeds"]), len(g["diverged_alone"])]
        figures = [pm(g["rise"]), pm(g["tails"]), pm(g["long"])]
        rows.append([g["contender"], f"{g['lr']:g}", g["precision"], *map(str, counts), *figures])
    note = f"\nRuns of {summary['steps']:,} steps. Diverged: given up, not finite at the end, or well above its own "
    note += "best mean loss. Transformer did not: diverged runs that a Transformer of the same size survived.\n"
    return markdown(header, rows) + note


def plot(summary: dict[str, Any], path: Path) -> None:
    """The loss of every run, by precision and learning rate."""
    groups = summary["groups"]
    precisions = list(dict.fromkeys(g["precision"] for g in groups))
    with figure(path, len(precisions), (5.5 * len(precisions), 4.2), sharey=True) as axes:
        for axis, precision in zip(axes, precisions):
            for colour, group in zip(COLOURS, (g for g in groups if g["precision"] == precision)):
                label = f"{group['contender']}, lr {group['lr']:g} ({group['runs']} seeds)"
                for i, (steps, points) in enumerate(group["curves"]):
                    mean = [p["mean"] for p in points]
                    axis.plot(steps, mean, color=colour, alpha=0.7, linewidth=1.2, label=label if i == 0 else None)
            axis.set(title=precision, xlabel="step")
            axis.legend()
        axes[0].set(ylabel="training loss, bits per byte")
