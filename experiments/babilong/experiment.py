"""BABILong's form in bytes (NL Fig. 9): facts scattered in a book, a question at the end, texts of up to a million."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.babilong.study import Babilong, BabilongWork, FactsContender
from experiments.choice.experiment import HOPE, PLAIN_HOPE, beside
from experiments.needles.experiment import LONG, plan
from experiments.shared.corpus import find_files
from experiments.shared.models.tasks import TaskJob
from experiments.shared.report import COLOURS, band, figure, markdown, pm, spread
from experiments.shared.work import Row

GROUP = "Models"
QUESTION = "Who knows, after texts of up to a million bytes, where somebody went last?"

__all__ = ["defaults", "plan", "plot", "summarize", "table", "work"]


def defaults() -> Babilong:
    """The experiment's settings."""
    small = {"mixer": "window_attention", "window": 64, "num_heads": 2}

    def hope(options: dict[str, Any]) -> list[dict[str, Any]]:
        return [small, beside(options | LONG) | {"window": 64}]

    contenders = [
        FactsContender("Hope, window 64", mixers=hope(HOPE)),
        FactsContender("Hope's memory alone", "selfmod", options=HOPE | LONG),
        FactsContender("attention", head_size=32, longest=16384),
        FactsContender("Hope, plain keys, window 64", mixers=hope(PLAIN_HOPE)),
    ]
    return Babilong(contenders=contenders, seeds=[0, 1, 2])


def work(settings: Babilong, data: str | Path | None, smoke: bool) -> BabilongWork:
    """What trains; book text comes from `data`, a folder of books."""
    return BabilongWork(settings, find_files(data, smoke))


def summarize(settings: Babilong, contenders: list[FactsContender], row: Row) -> dict[str, Any]:
    """Answers in % and cost by length of the text, over seeds."""
    found = []
    for contender in contenders:
        rows = [r for seed in settings.seeds if (r := row(TaskJob(contender.name, settings.tasks[0], seed)))]
        if rows:
            found.append(
                {"contender": contender.name, "parameters": rows[0]["parameters"]}
                | {name: _by_length(settings, rows, name, 100) for name in ("answers", "moved", "last")}
                | {"cost": _by_length(settings, rows, "seconds_per_byte", 1e6)}
                | {"questions": {n: sum(r["found"][n]["questions"] for r in rows) for n in rows[0]["found"]}}
            )
    head = {"experiment": "babilong", "length": settings.length, "lengths": list(settings.texts)}
    return head | {"contenders": found}


def _by_length(settings: Babilong, rows: list[dict[str, Any]], name: str, scale: float) -> dict[str, Any]:
    return {
        length: spread(None if (v := r["found"][length][name]) is None else scale * v for r in rows)
        for length in settings.texts
        if length in rows[0]["found"]
    }


def table(summary: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = []
    for s in summary["contenders"]:
        seeds = str(len(next(iter(s["answers"].values()))["values"]))
        for name, label, digits in (("answers", "", 1), ("moved", ", moved again", 1), ("cost", ", µs a byte", 1)):
            figures = [pm(s[name].get(length), digits) for length in summary["lengths"]]
            lines.append([f"{s['contender']}{label}", seeds, *figures])
    widest = max(summary["contenders"], key=lambda s: len(s["last"]), default=None)
    if widest:
        lines.append(["the text's last place", "-", *(pm(widest["last"].get(n), 1) for n in summary["lengths"])])
        asked = [f"{widest['questions'].get(n, 0):,}" for n in summary["lengths"]]
        lines.append([f"questions, of {widest['contender']}", "-", *asked])
    header = ["answers right, %, in texts of", "seeds", *(_named(int(n)) for n in summary["lengths"])]
    return markdown(header, lines) + (
        f"\nTrained on texts of up to {summary['length']} bytes. Mean ± standard deviation over seeds. "
        "Moved again: of the questions about people with more than one fact. Cost: processor time of reading, "
        "texts side by side, one thread.\n"
    )


def _named(length: int) -> str:
    for size, unit in ((1 << 20, "M"), (1 << 10, "K")):
        if length >= size:
            return f"{length // size}{unit}"
    return str(length)


def plot(summary: dict[str, Any], path: Path) -> None:
    """Answers and cost by length of the text, a line for each contender, a dot for each seed."""
    with figure(path, 2, (11, 4)) as (answers, cost):
        for s, colour in zip(summary["contenders"], COLOURS):
            for axis, name in ((answers, "answers"), (cost, "cost")):
                found = {int(n): f for n, f in s[name].items() if f}
                band(axis, list(found), list(found.values()), s["contender"], colour, marker=".")
        if summary["contenders"]:
            last = max((s["last"] for s in summary["contenders"]), key=len)
            answers.plot(
                [int(n) for n in last], [f["mean"] for f in last.values()], color="0.5", linestyle=":",
                label="the text's last place",
            )  # fmt: skip
        lengths = [int(n) for n in summary["lengths"]]
        for axis in (answers, cost):
            axis.set(xscale="log", xlabel="bytes of the text")
            axis.set_xticks(lengths, [_named(n) for n in lengths])
            axis.minorticks_off()
            axis.axvline(summary["length"], color="0.5", linewidth=1, linestyle="--")
        answers.set(ylabel="answers right, %", ylim=(-5, 105), title="Where is Mary? (dashed: trained length)")
        cost.set(ylabel="µs a byte", title="Cost of reading", ylim=(0, None))
        answers.legend(fontsize=8)
