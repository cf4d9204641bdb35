"""Table and figure of the needles: a row for each contender, a column for each kind of needles."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.shared.report import COLOURS, figure, markdown, pm, spread
from experiments.shared.work import Row

if TYPE_CHECKING:
    from experiments.needles.study import NeedleContender, Needles


def summarize(settings: Needles, contenders: list[NeedleContender], row: Row) -> dict[str, Any]:
    """Whole answers found, in %, of each contender by task and multiple of the trained length, over seeds."""
    from experiments.shared.models.tasks import TaskJob

    times = [f"{n}x" for n in settings.times]
    found = []
    for contender in contenders:
        tasks = {}
        for task in settings.tasks:
            runs = [r for s in settings.seeds if (r := row(TaskJob(contender.name, task, s)))]
            if runs:
                tasks[task] = {
                    "parameters": runs[0]["parameters"],
                    "answers": {n: spread(100 * r["accuracy"][n]["answers"] for r in runs) for n in times},
                    "bytes": {n: spread(100 * r["accuracy"][n]["bytes"] for r in runs) for n in times},
                }
        if tasks:
            found.append({"contender": contender.name, "tasks": tasks})
    run = [task for task in settings.tasks if any(task in own["tasks"] for own in found)]
    head = {"experiment": "needles", "length": settings.length, "times": times, "tasks": run}
    return head | {"contenders": found}


def table(summary: dict[str, Any]) -> str:
    """The figures as Markdown."""
    times = summary["times"]
    lines = [
        [found["contender"], *(_cell(found["tasks"].get(task), times) for task in summary["tasks"])]
        for found in summary["contenders"]
    ]
    return markdown([f"answers, {' / '.join(times)}", *summary["tasks"]], lines) + (
        f"\nAnswers found whole, in %, in texts of {', '.join(times)} the trained {summary['length']} bytes: "
        "mean ± standard deviation over seeds, in brackets how many.\n"
    )


def _cell(own: dict[str, Any] | None, times: list[str]) -> str:
    if not own:
        return "-"
    answers = [own["answers"][n] for n in times]
    return " / ".join(pm(found, 1) for found in answers) + f" ({len(answers[0]['values'])})"


def plot(summary: dict[str, Any], path: Path) -> None:
    """A panel for each task: whole answers by length, a line for each contender, a dot for each seed."""
    times, tasks = summary["times"], summary["tasks"]
    lengths = [int(n[:-1]) * summary["length"] for n in times]
    with figure(path, len(tasks), (2.0 + 2.3 * len(tasks), 3.4), sharey=True) as axes:
        for axis, task in zip(axes, tasks):
            for found, colour in zip(summary["contenders"], COLOURS):
                answers = [own["answers"][n] for n in times] if (own := found["tasks"].get(task)) else []
                axis.plot(lengths[: len(answers)], [a["mean"] for a in answers], color=colour, label=found["contender"])
                for length, answer in zip(lengths, answers):
                    axis.scatter([length] * len(answer["values"]), answer["values"], s=12, color=colour, alpha=0.7)
            axis.set(title=task, xlabel="bytes", ylim=(-5, 105), xscale="log")
            axis.set_xticks(lengths, [str(n) for n in lengths])
            axis.minorticks_off()
        axes[0].set(ylabel="answers found, %")
        axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
