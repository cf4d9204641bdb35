"""Tables and figure: recall by number of pairs, and the cost by length."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.shared.models import tasks_report
from experiments.shared.report import markdown, spread
from experiments.shared.work import Row

if TYPE_CHECKING:
    from experiments.caching.experiment import Caching
    from experiments.shared.models.tasks import TaskContender, TaskJob

_COSTS = ("trained", "next_token", "state_bytes")


def cost_job(name: str) -> TaskJob:
    """The job that measures what a contender costs."""
    from experiments.shared.models.tasks import TaskJob

    return TaskJob(name, "cost", 0, "cost")


def summarize(settings: Caching, contenders: list[TaskContender], row: Row) -> dict[str, Any]:
    """As the drawn tasks are, and of each contender what `cost_of` found, over its runs."""
    from experiments.shared.models.tasks import TaskJob

    summary = tasks_report.summarize(settings, contenders, row)
    for found in list(summary["contenders"]):
        runs = [r for s in settings.seeds if (r := row(TaskJob(found["contender"], "pairs", s)))]
        found["parameters"] = runs[0]["parameters"]
        if cost := row(cost_job(found["contender"])):
            found["cost"] = {name: cost[name] for name in _COSTS}
        if "afterwards" in runs[0]:
            labels = runs[0]["afterwards"]
            tests = {"pairs": {label: spread(100 * r["afterwards"][label] for r in runs) for label in labels}}
            after = {"contender": f"{found['contender']}, kept after training", "tasks": tests}
            summary["contenders"].insert(1 + summary["contenders"].index(found), after)
    return summary | {"lengths": settings.lengths}


def table(summary: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lengths = [str(n) for n in summary["lengths"]]
    shown = " / ".join(f"{int(n):,}" for n in lengths)
    header = ["contender", f"trained, tokens/s, {shown}", f"next token, ms, {shown}", f"state, KB, {shown}"]
    lines = []
    for found in summary["contenders"]:
        if not (cost := found.get("cost")):
            continue
        lines.append([
            found["contender"], _by(cost["trained"], lengths, ",.0f"), _by(cost["next_token"], lengths, ".2f"),
            _by(cost["state_bytes"], lengths, ",.0f", 1e3),
        ])  # fmt: skip
    note = f"\nOne text of {shown} tokens, processor time of one thread, medians.\n"
    return f"{tasks_report.table(summary)}\n{markdown(header, lines)}{note}"


def _by(figures: dict[str, float], lengths: list[str], form: str, unit: float = 1) -> str:
    return " / ".join(f"{figures[n] / unit:{form}}" for n in lengths)


def plot(summary: dict[str, Any], path: Path) -> None:
    """The right answers of each seed, by number of pairs."""
    tasks_report.plot(summary, path)
