"""What came out of reading long streams: figures by contender, a table and a picture."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from experiments.shared.report import COLOURS, band, count, figure, markdown, pm, spread

BASE, DEFAULT = "no levels", "default"


def of_model(rows: dict[str, dict[str, Any]], domains: int, sight: int) -> list[dict[str, Any]]:
    """The figures of one model: every contender's, over the streams that all read.

    Args:
        domains: read one after the other.  sight: windows until all were read once; the others are of the return.
    """
    found = [_contender(name, r, rows[BASE], domains, sight) for name, r in rows.items() if name != BASE]
    reference = next((c for c in found if c["contender"] == DEFAULT), None)
    for c in found if reference else ():
        for key in ("stream", "kept"):
            c[f"{key} above default"] = spread(a - b for a, b in zip(c[key]["values"], reference[key]["values"]))
    return found


def _contender(name: str, row: dict[str, Any], base: dict[str, Any], domains: int, sight: int) -> dict[str, Any]:
    gains = _less(base["windows"], row["windows"])  # [window][stream]
    knows = [_less(row["known"][0], now) for now in row["known"]]  # [time][domain][stream]; at first nothing is learned
    harms = [_less(now, row["other"][0]) for now in row["other"]]  # [time][text][stream]
    last = range(domains - 1)  # all but the last domain, which nothing follows
    return {
        "contender": name,
        "tokens": row["tokens"],
        "stream": spread(_over_rows(gains)),
        "first": spread(_over_rows(gains[:sight])),
        "back": spread(_over_rows(gains[sight:])),
        "learned": spread(_over_rows([knows[k + 1][k] for k in last])),
        "kept": spread(_over_rows([knows[domains][k] for k in last])),
        "end": spread(_over_rows(knows[-1])),
        "harm": spread(_over_rows(harms[-1])),
        "worst harm": max(x for now in harms for text in now for x in text),
        "state_bytes": row["state_bytes"],
        "reading_seconds": row.get("reading_seconds"),
        "wall_seconds": row["wall_seconds"],
        "curve": [spread(window) for window in gains],
        "first domain": [spread(now[0]) for now in knows],
        "harms": [spread(_over_rows(now)) for now in harms],
    }


def _less(a: list[list[float]], b: list[list[float]]) -> list[list[float]]:
    return [[x - y for x, y in zip(*pair)] for pair in zip(a, b)]


def _over_rows(rows: list[list[float]]) -> list[float]:
    """The mean of every stream."""
    return [statistics.fmean(column) for column in zip(*rows)]


def table(summary: dict[str, Any]) -> str:
    """Every contender of every model."""
    rows, timed = [], all(c.get("reading_seconds") for model in summary["found"] for c in model["contenders"])
    for model in summary["found"]:
        for c in model["contenders"]:
            keys = ("stream", "stream above default", "first", "back", "learned", "kept", "kept above default", "end")
            rows.append([c["contender"], model["model"], count(c["tokens"]), *(pm(c.get(k)) for k in keys),
                         pm(c["harm"]), f"{c['worst harm']:.3f}", f"{c['state_bytes'] / 1e6:,.1f}",
                         *([f"{c['reading_seconds']:,.0f}"] if timed else [])])  # fmt: skip
    text = markdown(["levels", "model", "tokens", "gain", "above default", "gain, first sight", "gain, return",
                     "learned", "kept", "kept, above default", "known at the end", "harm", "largest harm",
                     "state, MB", *(["reading, s"] if timed else [])], rows, left=2)  # fmt: skip
    text += (
        f"\nBits per byte below the same model without levels, mean ± standard deviation over {len(summary['seeds'])} "
    )
    text += (
        f"streams of their own order and parts: five domains of {summary['first']:,} tokens, then {summary['back']:,} "
    )
    text += "others of each of the first two. Gain: while reading, of what comes next. Above default: the difference, "
    text += (
        "stream by stream. Learned, kept: on parts never read, in a fresh context, right after their domain and when "
    )
    text += "all five were read (all domains but the last); known at the end: all domains, after the return. Harm: the "
    text += "rise on two novels that nobody reads, at the end; the largest of one of them at any time in any stream."
    text += " Reading: seconds of the processor for all streams, questions apart.\n" if timed else "\n"
    return text


def plot(summary: dict[str, Any], path: Path) -> None:
    """Along the streams, a row of panels for each model: gain while reading, the first domain, harm."""
    models = summary["found"]
    with figure(path, 3, (15, 4 * len(models)), rows=len(models)) as axes:
        for model, row in zip(models, axes if len(models) > 1 else [axes]):
            for number, c in enumerate(model["contenders"]):  # dashed where the colours begin anew
                colour = COLOURS[number % len(COLOURS)]
                window = c["tokens"] / len(c["curve"]) / 1000
                style = {"linewidth": 1.4, "linestyle": "-" if number < len(COLOURS) else "--"}
                row[0].plot([(n + 0.5) * window for n in range(len(c["curve"]))], [p["mean"] for p in c["curve"]],
                            label=c["contender"], color=colour, **style)  # fmt: skip
                for axis, key in ((row[1], "first domain"), (row[2], "harms")):
                    band(axis, list(range(len(c[key]))), c[key], c["contender"], colour, **style)
            row[0].set(title=f"{model['model']}: gain while reading", xlabel="thousand tokens", ylabel="bits per byte")
            row[1].set(title="gain on the first domain, never read parts", xlabel="parts read")
            row[2].set(title="harm to novels nobody reads", xlabel="parts read")
            for axis in row:
                axis.axhline(0, color="0.3", linewidth=1)
        first = axes[0] if len(models) == 1 else axes[0][0]
        first.set_ylim(top=1.3 * first.get_ylim()[1])  # room for the names above the lines
        first.legend(fontsize=8, loc="upper left", ncols=2)
