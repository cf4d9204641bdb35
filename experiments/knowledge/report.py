"""Table and figure of the experiment with new documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.shared.report import COLOURS, figure, markdown, pm

BASE = "closed book"
METHODS = ("none", "context", "levels", "finetune", "retrieval")


def on_pages(rows: dict[str, dict[str, Any] | None]) -> list[dict[str, Any]]:
    """What came out on the pages, of the contenders that were asked about them."""
    found, base = [], rows.get(BASE)
    for name, r in rows.items():
        if not r or not base:
            continue
        found.append({
            "contender": name, "questions": len(r["by_attribute"]), "tokens": r["tokens"], "chance": r["chance"],
            **{k: r[k] for k in ("accuracy", "calibrated", "margin", "by_attribute")},
            "gain": r["right"] - base["right"], "harm": r["other_bits"] - base["other_bits"],
        })  # fmt: skip
    return found


def table(summary: dict[str, Any]) -> str:
    """The figures as Markdown, and the accuracy by attribute."""
    rows, parts = [], []
    for c in summary["contenders"]:
        chunks = " + ".join(str(level["chunk_size"]) for level in c["levels"] if c["method"] == "levels") or "-"
        chosen = [pm(c["chosen"]["calibrated"], 2), pm(c["chosen"]["harm"])] if c["chosen"] else ["-", "-"]
        rows.append([c["contender"], chunks, ", ".join(map(str, c["updates"])) or "-", pm(c["accuracy"], 2),
                     pm(c["calibrated"], 2), pm(c["gain"], 2), pm(c["margin"], 2), pm(c["harm"]),
                     pm(c["learning_seconds"], 0), *chosen])  # fmt: skip
        parts.append([c["contender"], *(pm(a, 2) for a in c["by_attribute"].values())])
    text = markdown(["learner", "chunks", "updates", "accuracy", "calibrated accuracy", "gain", "margin",
                     "harm elsewhere", "seconds of learning", "calibrated, chosen", "harm, chosen"], rows)  # fmt: skip
    text += "\nCalibrated accuracy by attribute:\n\n"
    text += markdown(["learner", *summary["contenders"][0]["by_attribute"]], parts)
    text += f"\n{summary['people']} invented people, {summary['paraphrases']} short texts about each, "
    text += f"{summary['tokens']['mean']:,.0f} tokens read once; then every attribute of everybody is asked for, "
    text += 'without the texts (but "in context" and "retrieval"). '
    text += f"Mean ± standard deviation over {summary['seeds']} sets of people. Accuracy: the likeliest of the values "
    text += f"that occur is the right one; chance is {summary['chance']:.2f}. Calibrated: each value is first measured "
    text += "against its mean over all people. Gain: log-probability of the right value, in nats, over "
    text += f"{BASE}. Margin: the same minus the mean of the wrong values. Harm elsewhere: bits per byte of ordinary "
    text += "book text after reading minus before. Chosen: whether a question, or a part of ordinary text, is answered "
    text += "by what was learned or by nothing is chosen by it, or by its first 64 tokens.\n"
    if summary.get("pages"):
        text += _pages(summary["pages"])
    return text


def _pages(found: list[dict[str, Any]]) -> str:
    """The table of the pages."""
    pages = list(found[0]["by_attribute"])
    rows = [
        [c["contender"], f"{c['accuracy']:.2f}", "-" if c["contender"] == BASE else f"{c['calibrated']:.2f}",
         f"{c['gain']:.2f}", f"{c['margin']:.2f}", f"{c['harm']:.3f}",
         *("-" if c["contender"] == BASE else f"{c['by_attribute'][page]:.2f}" for page in pages)]
        for c in found
    ]  # fmt: skip
    text = "\nPages (two published ones, two notes), read once, and questions in other words:\n\n"
    text += markdown(["learner", "accuracy", "over closed book", "gain", "margin", "harm elsewhere", *pages], rows)
    text += f"\n{found[0]['tokens']:,} tokens, four choices of its own to each question (chance "
    text += f"{found[0]['chance']:.2f}). Over closed book: each value is first measured against what the model said of "
    text += "it before it read anything; of each page beside it. One run, nothing is drawn.\n"
    return text


def plot(summary: dict[str, Any], path: Path) -> None:
    """Accuracy, margin and harm of every learner."""
    names = [c["contender"] for c in summary["contenders"]]
    panels = [
        (("accuracy", "calibrated"), "Right answers", "accuracy (hollow: calibrated)", summary["chance"]),
        (("margin",), "Right value against the wrong ones", "nats", 0),
        (("harm",), "Harm elsewhere", "bits per byte, after minus before", 0),
    ]
    with figure(path, len(panels), (15, 1.4 + 0.36 * len(names)), sharey=True) as axes:
        for axis, (measures_, title, label, line) in zip(axes, panels):
            for place, c in enumerate(summary["contenders"]):
                colour = COLOURS[METHODS.index(c["method"])]
                for n, measure in enumerate(measures_):
                    if value := c[measure]:
                        axis.errorbar(value["mean"], place + 0.3 * n, xerr=value["std"], fmt="o", color=colour,
                                      capsize=3, markerfacecolor="white" if n else colour)  # fmt: skip
            axis.axvline(line, color="0.5", linewidth=0.8, linestyle=":" if line else "-")
            axis.set(title=title, xlabel=label)
        axes[0].set_yticks(range(len(names)), names)
        axes[0].invert_yaxis()
