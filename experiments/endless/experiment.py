"""A stream without an end in sight: ten million bytes of books and code, in passes, through a reader that is killed.

A small byte model reads through the product's own session (`nestling learn`), which is killed at random moments and
goes on. Asked are: does memory or time per token grow, is a loss ever no number, is the state whole after every kill,
is what comes out the same as without kills, and what is left of the first book at the end.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from experiments.endless.study import Endless, EndlessContender, EndlessJob, EndlessWork
from experiments.endless.texts import TEXTS
from experiments.shared.data import find_data
from experiments.shared.report import COLOURS, count, figure, markdown
from experiments.shared.work import Row

GROUP = "Continual learning"
QUESTION = "Ten million tokens and twenty kills: does anything grow, break, or get lost?"

DATA = "a folder with `books`; the experiment's README says where they come from"


def defaults() -> Endless:
    """The experiment's settings. Fields of the level that are not named are those of the default (decision D20)."""
    return Endless(contenders=[EndlessContender("snapshots", snapshots=8), EndlessContender("default")])


def work(settings: Endless, data: str | Path | None, smoke: bool) -> EndlessWork:
    """What does the jobs."""
    files = [place for place in TEXTS.values() if place.startswith("books/")]
    return EndlessWork(settings, None if smoke and data is None else find_data(data, ".", files, DATA))


def plan(settings: Endless, contenders: list[EndlessContender], row: Row) -> list[EndlessJob]:
    """Every contender reads the stream once."""
    return [EndlessJob(c.name) for c in contenders]


def summarize(settings: Endless, contenders: list[EndlessContender], row: Row) -> dict[str, Any]:
    """The figures of each contender; gains are over the model without levels."""
    found = []
    for contender in contenders:
        if r := row(EndlessJob(contender.name)):
            tenth = max(1, len(r["stretches"]) // 10)
            times, memory = ([s[key] for s in r["stretches"]] for key in ("milliseconds", "memory"))
            curve = [{"document": k["document"], **_gains(k, r["known"][0])} for k in r["known"]]
            read = [k for k in curve if 0 < k["document"] <= settings.parts]
            found.append({
                "contender": contender.name,
                **{k: r[k] for k in ("tokens", "not_finite", "kills", "whole", "same", "state_bytes")},
                "all texts": r["texts"],
                "curve": curve,
                "learned": read[-1],
                "end": curve[-1],
                "stretches": r["stretches"],
                "time": statistics.median(times[-tenth:]) / statistics.median(times[:tenth]),
                "memory": statistics.median(memory[-tenth:]) / statistics.median(memory[:tenth]),
            })  # fmt: skip
    facts = {k: getattr(settings, k) for k in ("texts", "size", "parts", "passes", "chunk", "probe")}
    return {"experiment": "endless", **facts, "contenders": found}


def _gains(now: dict[str, Any], before: dict[str, Any]) -> dict[str, float]:
    """Bits per byte below the model without levels: of the first text, and of what nobody reads."""
    return {
        f"{text} {how}": before[text][how] - now[text][how]
        for text in ("first", "elsewhere")
        for how in ("now", "best")
    }


def table(summary: dict[str, Any]) -> str:
    """Every contender: what it read, whether anything grew or broke, what is left of the first book."""
    rows = []
    for c in summary["contenders"]:
        known = [f"{c[at][f'first {how}']:.3f}" for at in ("learned", "end") for how in ("now", "best")]
        harm = [f"{-c['end'][f'elsewhere {how}']:.3f}" for how in ("now", "best")]
        rows.append([
            c["contender"], count(c["tokens"]), count(c["not_finite"]), f"{c['whole']} of {len(c['kills'])}",
            "yes" if c["same"] else "no", f"{c['memory']:.3f}", f"{c['time']:.3f}", *known, *harm,
            f"{c['state_bytes'] / 1e6:.2f}",
        ])  # fmt: skip
    text = markdown([
        "levels", "tokens", "losses not finite", "states whole after a kill", "same bits as without kills",
        "memory, last tenth over first", "time of a chunk, last tenth over first", "first book, right after",
        "right after, nearest", "first book, at the end", "at the end, nearest", "harm", "harm, nearest", "state, MB",
    ], rows)  # fmt: skip
    first, documents = summary["contenders"][0], len(summary["contenders"][0]["curve"]) - 1
    text += f"\n{documents} documents: {summary['parts']} parts of {len(first['all texts'])} texts, "
    text += f"{summary['passes']} times. First book: bits per byte below the same model without levels, on "
    text += f"{summary['probe']:,} bytes of it that are never read, in a fresh context, when all its parts were read "
    text += "once and at the end; by the levels as they stand, and by the nearest snapshot (chosen by the first 64 "
    text += "bytes, which count as without levels). Harm: the same of a novel that nobody reads, the other way round. "
    text += "Time (of the processor) and memory: medians.\n"
    return text


def plot(summary: dict[str, Any], path: Path) -> None:
    """Along the stream: the first book, time of a chunk, memory."""
    with figure(path, 3, (15, 4)) as axes:
        for c, colour in zip(summary["contenders"], COLOURS):
            for how, style in (("now", "-"), ("best", "--")):
                axes[0].plot([k["document"] for k in c["curve"]], [k[f"first {how}"] for k in c["curve"]], style,
                             color=colour, label=c["contender"] + (", nearest" if how == "best" else ""))  # fmt: skip
            at = [s["tokens"] / 1e6 for s in c["stretches"]]
            axes[1].plot(at, [s["milliseconds"] for s in c["stretches"]], color=colour, label=c["contender"])
            axes[2].plot(at, [s["memory"] / 1e6 for s in c["stretches"]], color=colour)
        axes[0].set(title="gain on the first book, never read parts", xlabel="documents read", ylabel="bits per byte")
        axes[0].legend(fontsize=8)
        axes[1].set(title="processor time of a chunk, median", xlabel="million tokens", ylabel="ms", ylim=(0, None))
        axes[2].set(title="resident memory", xlabel="million tokens", ylabel="MB", ylim=(0, None))
