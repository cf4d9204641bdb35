"""What came out of reading with the default levels, as figures, a table and a picture."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from experiments.shared.report import COLOURS, figure, markdown

BASE, DEFAULT = "no levels", "default"
SHOWN = ("smollm2-135m", "byte llama")  # text by text; of the others the means


def of_model(model: str, names: list[str], rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The figures of one model: every contender's over its texts, and every text's.

    Args:
        rows: {text: {contender: row}}, with the model without levels.
    """
    cells, base = [], {text: mine[BASE] for text, mine in rows.items() if BASE in mine}
    for text, plain in base.items():
        for name in names:
            if found := rows[text].get(name):
                cells.append(_cell(text, name, plain, found))
    reference = {c["text"]: c for c in cells if c["contender"] == DEFAULT}
    contenders = [_contender(name, [c for c in cells if c["contender"] == name], reference) for name in names]
    return {"model": model, "contenders": [c for c in contenders if c], "cells": cells}


def _cell(text: str, name: str, plain: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    harms = {key: bits - plain["other_bits"][key] for key, bits in found["other_bits"].items()}
    carried = None if found["after_bits"] is None else plain["after_bits"] - found["after_bits"]
    speed = found["plain_seconds"] / found["reading_seconds"] if found["reading_seconds"] else None  # of a CPU only
    return {
        "text": text, "kind": found["text_kind"], "contender": name, "tokens": found["read"],
        "before": plain["text_bits"], "gain": plain["text_bits"] - found["text_bits"], "carried": carried,
        "harm": statistics.fmean(harms.values()), "worst_harm": max(harms.values()),
        "state_bytes": found["state_bytes"], "of_plain": speed, "chosen": _chosen(found.get("choice"), set(harms)),
    }  # fmt: skip


def _chosen(choice: dict[str, Any] | None, other: set[str]) -> dict[str, float] | None:
    """What changes where a reader chooses by a text's beginning whether it takes what was learned to the rest."""
    if choice is None:
        return None
    rises = {name: c["bits"] - c["without"] for name, c in choice.items()}
    harms = [rises[name] for name in other]
    return {"gain": -rises["text"], "passed": sum(not c["levels"] for n, c in choice.items() if n not in other),
            "harm": statistics.fmean(harms), "worst_harm": max(harms)}  # fmt: skip


def _contender(name: str, cells: list[dict[str, Any]], reference: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Means over texts; the default on the same texts stands beside it, for a contender that read fewer."""
    if not cells:
        return None
    carried = [c["carried"] for c in cells if c["carried"] is not None]
    times = [c["of_plain"] for c in cells if c["of_plain"] is not None]
    chosen = [c["chosen"] for c in cells if c["chosen"] is not None]
    same = [reference[c["text"]]["gain"] for c in cells if c["text"] in reference]
    after = [reference[c["text"]]["carried"] for c in cells if c["carried"] is not None and c["text"] in reference]
    shares = [_share(same, [c["gain"] for c in cells]), _share(after, carried)]
    return {
        "contender": name,
        "texts": len(cells),
        "worse": sum(c["gain"] < 0 for c in cells),
        "gain": statistics.fmean(c["gain"] for c in cells),
        "default_gain": statistics.fmean(same) if same else None,
        "default_shares": shares,  # of this one's gain, and of its gain on what follows
        "carried": statistics.fmean(carried) if carried else None,
        "harm": statistics.fmean(c["harm"] for c in cells),
        "worst_harm": max(c["worst_harm"] for c in cells),
        "longest": max(c["tokens"] for c in cells),
        "state_bytes": max(c["state_bytes"] for c in cells),
        "of_plain": statistics.median(times) if times else None,
        "chosen": {
            "gain": statistics.fmean(c["gain"] for c in chosen),
            "passed": sum(c["passed"] for c in chosen),
            "harm": statistics.fmean(c["harm"] for c in chosen),
            "worst_harm": max(c["worst_harm"] for c in chosen),
        } if chosen else None,
    }  # fmt: skip


def _share(default: list[float], gains: list[float]) -> float | None:
    """The default's gain as a part of another's, on the same texts."""
    return sum(default) / sum(gains) if default and len(default) == len(gains) and sum(gains) > 0 else None


def table(summary: dict[str, Any]) -> str:
    """Every contender of every model, then the default text by text."""
    rows, texts = [], []
    for model in summary["found"]:
        for c in model["contenders"]:
            rows.append([c["contender"], model["model"], f"{c['texts']}", f"{c['longest']:,}", f"{c['worse']}",
                         f"{c['gain']:.3f}", _number(c["default_gain"]), _number(c["carried"]),
                         *map(_percent, c["default_shares"]), f"{c['harm']:.4f}",
                         f"{c['worst_harm']:.3f}", f"{c['state_bytes'] / 1e6:,.1f}",
                         "-" if c["of_plain"] is None else f"{c['of_plain']:.2f}", *_choice(c["chosen"])])  # fmt: skip
        for c in model["cells"]:
            if c["contender"] == DEFAULT and model["model"] in SHOWN:
                texts.append([model["model"], c["text"], c["kind"], f"{c['tokens']:,}", f"{c['before']:.3f}",
                              f"{c['before'] - c['gain']:.3f}", _number(c["carried"]), f"{c['harm']:+.4f}",
                              f"{c['worst_harm']:+.3f}", *_choice(c["chosen"])[1:]])  # fmt: skip
    text = markdown(["levels", "model", "texts", "longest", "worse after", "gain", "default's gain there", "gain on "
                     "what follows", "default's share of the gain", "of what follows", "harm", "largest harm",
                     "state, MB", "speed, of plain", "gain, chosen", "harm, chosen", "largest, chosen"],
                    rows, left=2)  # fmt: skip
    text += "\nThe default, text by text:\n\n"
    text += markdown(["model", "text", "kind", "tokens", "before", "after", "gain on what follows", "harm",
                      "largest harm", "harm, chosen", "largest, chosen"], texts, left=3)  # fmt: skip
    text += "\nBits per byte, in a fresh context. Before, after: the text that was read (its first and last "
    text += f"{summary['ends']} tokens, if it is longer). Gain: before minus after, the mean over texts; beside it the "
    text += "default's on the same texts, for contenders that read fewer, and as a share of this one's. What "
    text += "follows: the text's own continuation, unread, where there is one. Harm: the rise on three ordinary texts "
    text += "that were not read, their mean, and "
    text += "the largest of a single one. Speed: seconds of this thread for a plain forward over those for reading, "
    text += "the median over texts, on a loaded machine: see the benchmarks for a quiet one. Chosen: whether a text is "
    text += (
        "predicted by what was learned or by nothing is chosen by its first 64 tokens, and the others are counted.\n"
    )
    return text


def _choice(chosen: dict[str, float] | None) -> list[str]:
    if chosen is None:
        return ["-"] * 3
    return [f"{chosen['gain']:.3f}", f"{chosen['harm']:+.4f}", f"{chosen['worst_harm']:+.3f}"]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def plot(summary: dict[str, Any], path: Path) -> None:
    """Gain and harm of every text by its length, a panel pair for each model that is shown text by text."""
    models = [model for model in summary["found"] if model["model"] in SHOWN] or summary["found"]
    with figure(path, 2 * len(models), (5 * 2 * len(models), 3.8)) as axes:
        for n, model in enumerate(models):
            names = [c["contender"] for c in model["contenders"]]
            for axis, key in zip(axes[2 * n : 2 * n + 2], ("gain", "harm")):
                for colour, name in zip(COLOURS, names):
                    mine = [c for c in model["cells"] if c["contender"] == name]
                    axis.plot([c["tokens"] for c in mine], [c[key] for c in mine], "o", color=colour, label=name,
                              alpha=0.8, markersize=5)  # fmt: skip
                axis.axhline(0, color="0.3", linewidth=1)
                axis.set(xscale="log", title=f"{model['model']}: {key}", xlabel="tokens read", ylabel="bits per byte")
        axes[-1].legend(fontsize=7, loc="lower right")
