"""Table and figure of the choice: one row a contender, one column a task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.shared.report import COLOURS, figure, markdown, pm, spread
from experiments.shared.work import Row

if TYPE_CHECKING:
    from experiments.choice.study import Choice, ChoiceContender


def summarize(settings: Choice, contenders: list[ChoiceContender], row: Row) -> dict[str, Any]:
    """Figures of each contender; a difference is to the first contender, seed by seed where both were run."""
    from experiments.choice.study import ChoiceJob

    def rows(name: str, task: str) -> dict[int, dict[str, Any]]:
        return {s: r for s in settings.seeds if (r := row(ChoiceJob(name, task, s)))}

    found, base = [], contenders[0].name
    for contender in contenders:
        tasks = {}
        for task in settings.tasks:
            if not (runs := rows(contender.name, task)):
                continue
            figures: dict[str, Any] = {"runs": len(runs), "parameters": next(iter(runs.values()))["parameters"]}
            if "accuracy" in next(iter(runs.values())):
                sizes = next(iter(runs.values()))["accuracy"]
                figures["accuracy"] = {n: spread(100 * r["accuracy"][n] for r in runs.values()) for n in sizes}
            else:
                own = rows(base, task)
                figures["bits_per_byte"] = spread(r["bits_per_byte"] for r in runs.values())
                figures["difference"] = spread(
                    r["bits_per_byte"] - own[s]["bits_per_byte"] for s, r in runs.items() if s in own
                )
                figures["tokens_per_second"] = spread(r["tokens_per_second"] for r in runs.values())
            tasks[task] = figures
        if tasks:
            found.append({"contender": contender.name, "tasks": tasks})
    return {"experiment": settings.name, "tasks": settings.tasks, "base": base, "contenders": found}


def table(summary: dict[str, Any]) -> str:
    """The figures as Markdown."""
    drawn = {task: sizes for task in summary["tasks"] if (sizes := _sizes(summary, task))}
    texts = [task for task in summary["tasks"] if task.startswith("text")]
    header = ["contender", *(f"{task} {' / '.join(sizes)}" for task, sizes in drawn.items())]
    for task in texts:
        header += [task.replace("text", "language,") + " steps", f"- {summary['base']}"]
    lines = []
    for found in summary["contenders"]:
        line = [found["contender"]]
        for task in drawn:
            line.append(_accuracy(found["tasks"].get(task)))
        for task in texts:
            own = found["tasks"].get(task, {})
            line.append(pm(own.get("bits_per_byte")) + _runs(own))
            line.append("-" if found["contender"] == summary["base"] else pm(own.get("difference")))
        lines.append(line)
    note = (
        "\nAccuracy in % by length or by pairs, held-out bits per byte at equal parameters: mean ± standard deviation "
    )
    note += "over seeds, in brackets how many.\n"
    return markdown(header, lines) + note


def _sizes(summary: dict[str, Any], task: str) -> list[str]:
    found = (c["tasks"].get(task, {}).get("accuracy") for c in summary["contenders"])
    return next((list(sizes) for sizes in found if sizes), [])


def _accuracy(figures: dict[str, Any] | None) -> str:
    return "-" if not figures else " / ".join(pm(a, 1) for a in figures["accuracy"].values()) + _runs(figures)


def _runs(figures: dict[str, Any]) -> str:
    return f" ({figures['runs']})" if figures else ""


def plot(summary: dict[str, Any], path: Path) -> None:
    """A panel for each task: the hardest accuracy of each seed, or the bits per byte."""
    names = [c["contender"] for c in summary["contenders"]]
    with figure(
        path, len(summary["tasks"]), (3 + 3 * len(summary["tasks"]), 1.4 + 0.3 * len(names)), sharey=True
    ) as axes:
        for axis, task in zip(axes, summary["tasks"]):
            for place, found in enumerate(summary["contenders"]):
                figures = found["tasks"].get(task)
                if not figures:
                    continue
                shown = [figures["bits_per_byte"]] if "bits_per_byte" in figures else [*figures["accuracy"].values()]
                for value, colour in zip(shown, COLOURS):
                    axis.scatter(value["values"], [place] * len(value["values"]), s=16, color=colour, alpha=0.7)
            sizes = _sizes(summary, task)
            for size, colour in zip(sizes, COLOURS):
                axis.scatter([], [], s=16, color=colour, label=size)
            if sizes:
                axis.legend(title="length" if task.startswith("parity") else "pairs", fontsize=8)
            axis.set(title=task, xlabel="accuracy, %" if sizes else "bits per byte (lower is better)")
        axes[0].set_yticks(range(len(names)), names)
        axes[0].invert_yaxis()
