"""Table and figure of drawn tasks: a row for each contender, a column for each task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.shared.report import COLOURS, figure, markdown, pm, spread
from experiments.shared.work import Row

if TYPE_CHECKING:
    from experiments.shared.models.tasks import TaskContender, TaskStudy


def summarize(settings: TaskStudy, contenders: list[TaskContender], row: Row) -> dict[str, Any]:
    """Right answers in % of each contender by task and test, over seeds."""
    from experiments.shared.models.tasks import TaskJob

    found = []
    for contender in contenders:
        tasks = {}
        for task in settings.tasks:
            runs = [r for s in settings.seeds if (r := row(TaskJob(contender.name, task, s)))]
            if runs:
                labels = settings.known[task].tests
                tasks[task] = {label: spread(100 * r["accuracy"][label] for r in runs) for label in labels}
        if tasks:
            found.append({"contender": contender.name, "tasks": tasks})
    tests = {task: [*settings.known[task].tests] for task in settings.tasks}
    return {"experiment": settings.name, "steps": settings.steps, "tests": tests, "contenders": found}


def table(summary: dict[str, Any]) -> str:
    """The figures as Markdown."""
    tests = summary["tests"]
    heads = [task if len(labels) == 1 else f"{task}: {' / '.join(labels)}" for task, labels in tests.items()]
    lines = [[c["contender"], *(_cell(c["tasks"].get(task)) for task in tests)] for c in summary["contenders"]]
    return markdown(["right answers, %", *heads], lines) + (
        f"\nAfter {summary['steps']:,} steps; mean ± standard deviation over seeds (how many), or one seed.\n"
    )


def _cell(own: dict[str, Any] | None) -> str:
    if not own:
        return "-"
    runs = _seeds(own)
    return " / ".join(pm(found, 1) for found in own.values()) + (f" ({runs})" if runs > 1 else "")


def _seeds(own: dict[str, Any]) -> int:
    return max(len(found["values"]) for found in own.values())


def plot(summary: dict[str, Any], path: Path) -> None:
    """A panel for each task: the right answers of each seed, by test."""
    names = [c["contender"] for c in summary["contenders"]]
    tests = summary["tests"]
    size = (2.4 + 1.9 * len(tests), 1.6 + 0.3 * len(names))
    with figure(path, len(tests), size, sharey=True) as axes:
        for axis, (task, labels) in zip(axes, tests.items()):
            for place, found in enumerate(summary["contenders"]):
                for number, (label, colour) in enumerate(zip(labels, COLOURS)):
                    values = found["tasks"].get(task, {}).get(label, {"values": []})["values"]
                    height = place + 0.24 * (number - (len(labels) - 1) / 2)
                    shown = label if place == 0 else None
                    axis.scatter(values, [height] * len(values), s=18, color=colour, alpha=0.7, label=shown)
            axis.set(title=task, xlabel="right, %", xlim=(-5, 105))
            if len(labels) > 1:
                axis.legend(fontsize=7, loc="lower left")
        axes[0].set_yticks(range(len(names)), names)
        axes[0].invert_yaxis()
