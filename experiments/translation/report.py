"""What came out of learning two languages: figures by contender, a table and a plot."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from experiments.shared.continual.rows import Rows
from experiments.shared.report import COLOURS, figure, markdown, pm, spread

BASE, REFERENCES = "no levels", ("fine-tuning", "fine-tuning, all weights")
MEASURES = ("chrf", "bits")


def summary(settings: Any, rows: Rows) -> dict[str, Any]:
    """Means over seeds. `lost`: on the first language, right after it against after the last (positive: forgotten)."""
    first = settings.languages[0]
    found = []
    for name, runs in rows.items():
        entry: dict[str, Any] = {"contender": name, "seconds": spread(r["seconds"] for r in runs)}
        for measure in MEASURES:
            for language in settings.languages:
                for stage in ("alone", "after both"):
                    values = spread(r["figures"][language][stage][measure] for r in runs)
                    entry[f"{measure} {language} {stage}"] = values
            lost = [r["figures"][first]["alone"][measure] - r["figures"][first]["after both"][measure] for r in runs]
            entry[f"{measure} lost"] = spread(lost if measure == "chrf" else [-x for x in lost])
        if all(r["curve"] for r in runs):
            entry["curve"] = [spread(x / math.log(2) for x in window) for window in zip(*(r["curve"] for r in runs))]
            entry["read"] = runs[0]["tokens"]
        entry["examples"] = {n: f["alone"]["examples"] for n, f in runs[0]["figures"].items()}
        found.append(entry)
    by_name = {e["contender"]: e for e in found}
    for entry in found:
        for measure in MEASURES:
            entry[f"{measure} share"] = {
                r: entry[f"{measure} lost"]["mean"] / by_name[r][f"{measure} lost"]["mean"]
                for r in REFERENCES if r in by_name and by_name[r][f"{measure} lost"]["mean"] > 0
            }  # fmt: skip
    facts = {k: getattr(settings, k) for k in ("languages", "verses", "tests", "context", "shown", "longest", "seeds")}
    return {"experiment": "translation", **facts, "contenders": found}


def table(found: dict[str, Any]) -> str:
    """One row per contender and measure."""
    first, second = found["languages"][0], found["languages"][-1]
    text = ""
    titles = (("chrf", "chrF (higher is better)", 1), ("bits", "Bits per byte (lower is better)", 3))
    for measure, title, digits in titles:
        header = ["contender", f"{first} alone", f"{second} alone", f"{first} after {second}", f"lost on {first}"]
        header += [f"{second} after {first}", *(f"lost / that of {r}" for r in REFERENCES)]
        rows = []
        for e in found["contenders"]:
            cells = [e[f"{measure} {first} alone"], e[f"{measure} {second} alone"], e[f"{measure} {first} after both"]]
            cells += [e[f"{measure} lost"], e[f"{measure} {second} after both"]]
            shares = [e[f"{measure} share"].get(r) for r in REFERENCES]
            ends = ["-" if share is None else f"{share:.2f}" for share in shares]
            rows.append([e["contender"], *(pm(c, digits) for c in cells), *ends])
        text += f"{title}:\n\n{markdown(header, rows)}\n"
    text += markdown(["contender", "seconds"], [[e["contender"], pm(e["seconds"], 0)] for e in found["contenders"]])
    return text + (
        f"\nMean ± standard deviation over {len(found['seeds'])} seeds, which draw the verses and their order: "
        f"{found['verses']} verses of each language read once, {found['tests']} of a held-out book translated. Levels "
        f"and fine-tuning translate with no example in the context; in-context learning has the last "
        f"{found['shown']:,} tokens of what was read. Bits per byte: of the English given the source. Lost: the change "
        "on the first "
        "language from right after reading it to after the second, positive where it was forgotten; the last columns "
        "set its mean against fine-tuning's, where that forgot at all.\n"
    )


def plot(found: dict[str, Any], path: Path) -> None:
    """chrF and bits of the first language before and after the second, and the loss along the stream."""
    first, second = found["languages"][0], found["languages"][-1]
    entries = found["contenders"]
    kinds = (
        (f"{first} alone", f"{first}", COLOURS[0], -0.22),
        (f"{first} after both", f"{first}, after {second}", COLOURS[1], 0.0),
        (f"{second} alone", f"{second}", COLOURS[2], 0.22),
    )
    with figure(path, 3, (16, 2.0 + 0.45 * len(entries))) as axes:
        for axis, measure, label in zip(axes, MEASURES, ("chrF", "bits per byte")):
            for key, name, colour, shift in kinds:
                cells = [e[f"{measure} {key}"] for e in entries]
                axis.errorbar(
                    [c["mean"] for c in cells], [n + shift for n in range(len(cells))], xerr=[c["std"] for c in cells],
                    fmt="o", markersize=5, capsize=3, color=colour, label=name,
                )  # fmt: skip
            axis.set(title=f"Held-out verses: {label}", xlabel=label)
            axis.set_yticks(range(len(entries)), [e["contender"] if axis is axes[0] else "" for e in entries])
            axis.invert_yaxis()
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, columnspacing=0.8, handletextpad=0.2)
        read = [e for e in entries if "curve" in e]
        for n, e in enumerate(read):
            means = smooth([c["mean"] for c in e["curve"]])
            places = [(i + 0.5) * found["context"] for i in range(len(means))]
            axes[2].plot(places, means, label=e["contender"], color=COLOURS[n % len(COLOURS)])
        if read:
            axes[2].axvline(read[0]["read"][first], color="0.5", linewidth=0.8, linestyle="--")
            axes[2].legend(fontsize=9)
        axes[2].set(title=f"First sight: {first}, then {second}", xlabel="tokens read", ylabel="bits per token")


def smooth(values: list[float], over: int = 5) -> list[float]:
    """A running mean of the last few values."""
    return [sum(values[max(0, i - over + 1) : i + 1]) / min(i + 1, over) for i in range(len(values))]
