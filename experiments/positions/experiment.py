"""Loss by position to eight times the trained window, and with the state carried over a whole book (NL Fig. 10)."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path
from typing import Any

from experiments.positions.study import Positions, PositionsWork
from experiments.quality.experiment import GATED_DELTANET, HYBRID, SAMBA, plan, rates
from experiments.shared.models.study import ModelContender, TrainingJob
from experiments.shared.report import COLOURS, band, bootstrap, count, figure, markdown, pm, spread
from experiments.shared.work import Row

GROUP = "Models"
QUESTION = "Does a model predict better, or worse, the more it has read beyond the windows it was trained on?"

__all__ = ["defaults", "plan", "plot", "summarize", "table", "work"]

PARTS = 4  # of the book, for the difference by place


def defaults() -> Positions:
    """The experiment's settings: models, text and training of `quality`, each at the rate it found best with Muon."""
    return Positions.from_dict(
        {
            "name": "positions",
            "steps": 800,
            "seeds": [0, 1],
            "model": {
                "name": "tiny",
                "options": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
                | {"mixer_options": {"expansion": 2}},
            },
            "data": {"seq_len": 512, "batch_size": 2},
            "optim": {"name": "muon"},
            "contenders": [
                {"name": "hope", "lrs": [3e-3]},
                {"name": "hope, hybrid", "model": HYBRID, "lrs": [1e-2]},
                {"name": "transformer + conv", "mixer": "attention", "lrs": [1e-2]},
                {"name": "gated deltanet", "model": GATED_DELTANET, "lrs": [1e-2]},
                {"name": "gated deltanet and window", "model": SAMBA, "lrs": [1e-2]},
            ],
        }
    )


def work(settings: Positions, data: str | Path | None, smoke: bool) -> PositionsWork:
    """What trains, on the text files of `data`."""
    return PositionsWork(settings, data, smoke)


def summarize(settings: Positions, contenders: list[ModelContender], row: Row) -> dict[str, Any]:
    """Bits per byte by reading and stretch of the window, and what a longer past changes on the same bytes."""
    found = [s for s in (_summary(settings, c, row) for c in contenders) if s]
    head = {"experiment": "positions", "trained": settings.data.seq_len, "edges": settings.edges}
    return head | {"windows": settings.read_windows, "contenders": found}


def _summary(settings: Positions, contender: ModelContender, row: Row) -> dict[str, Any] | None:
    jobs = [TrainingJob(contender.name, rates(settings, contender)[0], seed, kind="test") for seed in settings.seeds]
    rows = [r for r in map(row, jobs) if r]
    if not rows:
        return None
    edges, names = settings.edges, list(rows[0]["bits"])
    stretches = list(itertools.pairwise(edges))
    beyond = [i for i, (first, _) in enumerate(stretches) if first >= settings.data.seq_len]
    by_stretch = {
        name: [spread(statistics.fmean(w[i] for w in r["bits"][name]) for r in rows) for i in range(len(stretches))]
        for name in names
    }

    def far(r: dict[str, Any], name: str) -> list[float]:
        """Of each window, the bits of all bytes beyond the trained length."""
        total = sum(edges[i + 1] - edges[i] for i in beyond)
        return [sum(w[i] * (edges[i + 1] - edges[i]) for i in beyond) / total for w in r["bits"][name]]

    differences = {}
    for name in ("whole", "carried"):
        pairs = [[a - b for a, b in zip(far(r, name), far(r, "cut"))] for r in rows]
        parts = [[p[k * len(p) // PARTS : (k + 1) * len(p) // PARTS] for k in range(PARTS)] for p in pairs]
        differences[name] = {
            "mean": spread(map(statistics.fmean, pairs)),
            "interval": bootstrap(pairs),
            "by_part": [spread(statistics.fmean(p[k]) for p in parts if p[k]) for k in range(PARTS)],
            "by_stretch": [
                spread(
                    statistics.fmean(a[i] - b[i] for a, b in zip(r["bits"][name], r["bits"]["cut"])) for r in rows
                )
                for i in range(len(stretches))
            ],
        }  # fmt: skip
    return {
        "contender": contender.name,
        "lr": jobs[0].lr,
        "by_stretch": by_stretch,
        "beyond": {name: spread(statistics.fmean(far(r, name)) for r in rows) for name in names},
        "differences": differences,
        "reading_seconds": {name: spread(r["reading_seconds"][name] for r in rows) for name in names},
    }


def table(summary: dict[str, Any]) -> str:
    """The figures as Markdown: two tables, of readings beyond the trained length and of the loss by position."""
    edges, trained = summary["edges"], summary["trained"]
    header = [
        "model",
        "seeds",
        "short contexts",
        "window - short",
        "95% interval",
        "carried - short",
        "95% interval of it",
    ]
    header += ["first quarter of the book", "last quarter", f"carried - window, bytes {edges[1] + 1}-{edges[2]}"]
    lines = []
    for s in summary["contenders"]:
        whole, carried = s["differences"]["whole"], s["differences"]["carried"]
        lines.append(
            [s["contender"], str(len(s["beyond"]["cut"]["values"])), pm(s["beyond"]["cut"])]
            + [text for d in (whole, carried) for text in (_signed(d["mean"]), _interval(d["interval"]))]
            + [_signed(carried["by_part"][0]), _signed(carried["by_part"][-1]), _signed(carried["by_stretch"][1])]
        )
    first = markdown(header, lines)
    first += (
        f"\nBits per byte of the held-out book, mean ± standard deviation over seeds, on bytes "
        f"{trained + 1}-{count(edges[-1])} of {summary['windows']} windows; trained on windows of {trained}. Short "
        f"contexts: every {trained // 4} bytes the last {trained} are read from nothing. Window: read in one go from "
        "the window's first byte, attention over all of it. Carried: the state from the book's first byte on, "
        f"attention over the last {trained}; in the quarters: less short contexts too. The last column is of the bytes "
        f"before which a window has {edges[1]} to {edges[2] - 1} bytes, and the stream all. Intervals: bootstrap over "
        "seeds and windows.\n\n"
    )
    stretches = [f"{count(a + 1)}-{count(b)}" for a, b in itertools.pairwise(edges)]
    lines = [
        [f"{s['contender']}, {label}", *(pm(found) for found in s["by_stretch"][name])]
        for s in summary["contenders"]
        for name, label in (("whole", "window"), ("cut", "short contexts"), ("carried", "carried"))
    ]
    return first + markdown(["bits per byte at bytes", *stretches], lines)


def _signed(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    return pm(found) if found["mean"] < 0 else f"+{pm(found)}"


def _interval(found: list[float] | None) -> str:
    return "-" if found is None else f"{found[0]:.3f} to {found[1]:.3f}"


def plot(summary: dict[str, Any], path: Path) -> None:
    """By position: the loss of whole windows, and what the longer past changes; by part of the book: carried state."""
    edges, trained = summary["edges"], summary["trained"]
    middle = [(max(a, 1) * b) ** 0.5 for a, b in itertools.pairwise(edges)]
    with figure(path, 3, (15, 4.4)) as (loss, change, parts):
        for s, colour in zip(summary["contenders"], COLOURS):
            band(loss, middle, s["by_stretch"]["whole"], s["contender"], colour, marker=".")
            loss.plot(middle, [f["mean"] for f in s["by_stretch"]["cut"]], color=colour, linestyle=":")
            band(change, middle, s["differences"]["whole"]["by_stretch"], s["contender"], colour, marker=".")
            found = [(k, f) for k, f in enumerate(s["differences"]["carried"]["by_part"], 1) if f]
            band(parts, [k for k, _ in found], [f for _, f in found], s["contender"], colour, marker=".")
        for axis in (loss, change):
            axis.axvline(trained, color="0.5", linewidth=1, linestyle="--")
            axis.set(xscale="log", xlabel="bytes read of the window (dashed: trained length)")
            axis.set_xticks(edges[1:], [str(edge) for edge in edges[1:]])
            axis.minorticks_off()
        beyond = [f["mean"] for s in summary["contenders"] for f in s["by_stretch"]["whole"][1:]]
        loss.set(ylabel="bits per byte", title="A window in one go; dotted: short contexts")
        loss.set_ylim(min(beyond, default=0) - 0.05, min(max(beyond, default=8), min(beyond, default=0) + 1) + 0.05)
        change.axhline(0, color="0.5", linewidth=1)
        change.set(ylabel="bits per byte", title="A window in one go less short contexts")
        far = [f["mean"] for s in summary["contenders"] for f in s["differences"]["whole"]["by_stretch"]]
        change.set_ylim(max(-0.1, min(far, default=0) * 1.2), min(0.3, max(far, default=0.1) * 1.2))
        parts.axhline(0, color="0.5", linewidth=1)
        parts.set(xlabel="quarter of the book", ylabel="bits per byte", title="State carried over the book less short")
        parts.set_xticks(range(1, PARTS + 1))
        loss.legend(fontsize=8)
