"""Small-scale language modelling at equal parameters, tokens and tuned learning rate (the figure of NL Table 2, small).

Every contender searches the same learning rates with the first seed; the best on the tails is run with the other seeds;
only those final runs ever see the book that is held out whole.
"""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

from experiments.choice.experiment import DELTA, HOPE, TWO_KINDS, beside, horizon
from experiments.shared.models.paper import PaperRun
from experiments.shared.models.runs import TrainingWork
from experiments.shared.models.study import ModelContender, TrainingJob, TrainingStudy
from experiments.shared.report import (
    COLOURS,
    band,
    bootstrap,
    count,
    figure,
    markdown,
    mean_bins,
    mean_curve,
    pm,
    spread,
)
from experiments.shared.work import Row

GROUP = "Models"
QUESTION = "How good is Hope beside other sequence layers, at equal parameters, tokens and tuned learning rate?"


# every option written out: the table keeps its meaning when a default changes
WINDOW = {"mixer": "window_attention", "window": 256}
HYBRID = {"mixers": [WINDOW, beside(HOPE | horizon(2048, 32768))], "num_attention_heads": 2}
KINDS = {"mixers": [WINDOW, beside(TWO_KINDS)], "num_attention_heads": 2}
GATED_DELTANET = {"mixers": [{"mixer": "selfmod"} | DELTA], "num_attention_heads": 2}
SAMBA = {"mixers": [{"mixer": "selfmod"} | DELTA, WINDOW], "num_attention_heads": 2}


def defaults() -> TrainingStudy:
    """The experiment's settings."""
    plain = {"mixer": "attention", "options": {"conv_size": 0}}
    return TrainingStudy.from_dict(
        {
            "name": "quality",
            "steps": 800,
            "test": True,
            # what everybody's parameters are set to: those of Hope with memories of expansion 2
            "model": {"name": "tiny", "options": _model(128, 2, 4) | {"mixer_options": {"expansion": 2}}},
            "data": {"seq_len": 512, "batch_size": 2},
            "optim": {"name": "adamw"},
            "lrs": [1e-3, 3e-3, 1e-2],
            # the slow ones first, so that no process waits for them at the end
            "contenders": [
                {"name": "hope, muon", "optim": "muon"},
                {"name": "hope, hybrid, muon", "model": HYBRID, "optim": "muon"},
                # at the rate that was best of three for the hybrid with one kind of heads
                {"name": "hope, two kinds, muon", "model": KINDS, "optim": "muon", "lrs": [1e-2]},
                {"name": "hope"},
                {"name": "hope, expansion 2", "options": {"expansion": 2}},
                {"name": "titans", "mixer": "titans"},
                {"name": "titans, expansion 2", "mixer": "titans", "options": {"expansion": 2}},
                {"name": "deltanet", "mixer": "deltanet"},
                {"name": "transformer + conv", "mixer": "attention"},
                {"name": "transformer"} | plain,
                {"name": "transformer + conv, muon", "mixer": "attention", "optim": "muon"},
                {"name": "gated deltanet, muon", "model": GATED_DELTANET, "optim": "muon"},
                {"name": "gated deltanet and window, muon", "model": SAMBA, "optim": "muon"},
                {"name": "hope, hybrid", "model": HYBRID},
                {"name": "gated deltanet", "model": GATED_DELTANET},
                {"name": "gated deltanet and window", "model": SAMBA},
                {"name": "transformer, muon", "optim": "muon"} | plain,
                {"name": "hope, hybrid, m3", "model": HYBRID, "optim": "m3"},
                {"name": "transformer + conv, m3", "mixer": "attention", "optim": "m3"},
            ],
        }
    )


def paper() -> list[PaperRun]:
    """NL Table 2: both sizes, with the baselines that this package has."""
    contenders: dict[str, dict[str, Any]] = {
        "hope": {},
        "hope, self-modifying": {"mixer": "selfmod"},
        "hope-attention": {"mixer": "attention"},
        "titans": {"mixer": "titans"},
        "deltanet": {"mixer": "deltanet"},
        "gated deltanet": {"mixer": "gated_deltanet"},
        "gated deltanet and window": {"mixers": ["gated_deltanet", {"mixer": "window_attention", "window": 2048}]},
        "transformer": {"mixer": "attention", "mixer_options": {"conv_size": 0, "output_gate": False}},
    }
    train = {
        "precision": "bf16", "data.tokenizer": "bpe:32000", "data.seq_len": 4096, "data.batch_size": 16,
        "optim.accumulate": 8, "optim.name": "adamw", "optim.lr": 4e-4, "schedule.warmup": 0.02,
        "parallel.mode": "fsdp", "logging.save_every": 1000, "logging.eval_every": 1000,
    }  # fmt: skip
    return [PaperRun(size, tokens, contenders, train) for size, tokens in (("760m", 30e9), ("1.3b", 100e9))]


def _model(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}


def work(experiment: TrainingStudy, data: str | Path | None, smoke: bool) -> TrainingWork:
    """What trains, on the text files of `data`."""
    return TrainingWork(experiment, data, smoke)


def plan(experiment: TrainingStudy, contenders: list[ModelContender], row: Row) -> list[TrainingJob]:
    """Search runs, then the other seeds at each contender's best learning rate, then their tests."""
    search = [_search(experiment, c, lr) for c in contenders for lr in rates(experiment, c)]
    finals = [final_jobs(experiment, c, row) for c in contenders]
    by_seed = [job for jobs in zip(*(f for f in finals if f)) for job in jobs]
    tests = [TrainingJob(j.contender, j.lr, j.seed, j.precision, "test") for j in by_seed if row(j)]
    return tests + search + [job for job in by_seed if job not in search]


def final_jobs(experiment: TrainingStudy, contender: ModelContender, row: Row) -> list[TrainingJob]:
    """The runs that count: every seed at the learning rate that was best on the tails; none before the search ends."""
    found = [(job, row(job)) for job in (_search(experiment, contender, lr) for lr in rates(experiment, contender))]
    usable = [(r["bits_per_byte"], j.lr) for j, r in found if r and not r["diverged"] and r["bits_per_byte"]]
    if not usable or any(r is None for _, r in found):
        return []
    lr = min(usable)[1]
    return [TrainingJob(contender.name, lr, seed, experiment.precisions[0]) for seed in experiment.seeds]


def rates(experiment: TrainingStudy, contender: ModelContender) -> list[float]:
    """The learning rates that are searched for a contender."""
    return contender.lrs or experiment.lrs


def _search(experiment: TrainingStudy, contender: ModelContender, lr: float) -> TrainingJob:
    return TrainingJob(contender.name, lr, experiment.seeds[0], experiment.precisions[0])


def summarize(experiment: TrainingStudy, contenders: list[ModelContender], row: Row) -> dict[str, Any]:
    """Figures of each contender, best on the held-out book first."""
    found = [s for s in (_summary(experiment, c, row) for c in contenders) if s]
    found.sort(key=lambda s: ((s["book"] or s["tails"] or {"mean": 99})["mean"], s["contender"]))
    own = next((s for s in found if s["contender"] == experiment.contenders[0].name), None)
    for s in found:
        s["book_minus_first"] = _paired(s, own)
    for s in found:
        s.pop("book_by_window")  # only for the interval
    return {
        "experiment": experiment.name,
        "first": experiment.contenders[0].name,
        "tokens": experiment.steps * experiment.tokens_per_step,
        "tokens_per_step": experiment.tokens_per_step,
        "contenders": found,
    }


def _summary(experiment: TrainingStudy, contender: ModelContender, row: Row) -> dict[str, Any] | None:
    search = {lr: row(_search(experiment, contender, lr)) for lr in rates(experiment, contender)}
    jobs = final_jobs(experiment, contender, row)
    rows = [r for r in map(row, jobs) if r]
    if not any(search.values()):
        return None
    tests = [(j.seed, r) for j in jobs if (r := row(TrainingJob(j.contender, j.lr, j.seed, j.precision, "test")))]
    lr, lrs = (jobs[0].lr if jobs else None), sorted(rates(experiment, contender))
    return {
        "contender": contender.name,
        "mixer": contender.mixer,
        "options": contender.options,
        "optim": contender.optim or experiment.optim.name,
        "parameters": next(r["parameters"] for r in search.values() if r),
        "search": {f"{lr:g}": r and r["bits_per_byte"] for lr, r in search.items()},
        "lr": lr,
        "lr_at_edge": len(lrs) > 1 and lr in (lrs[0], lrs[-1]),
        "tails": spread(r["bits_per_byte"] for r in rows),
        "book": spread(r["bits_per_byte"] for _, r in tests),
        "book_by_seed": {str(seed): r["bits_per_byte"] for seed, r in tests},
        "book_by_window": {str(seed): r["bits_by_window"] for seed, r in tests if "bits_by_window" in r},
        "diverged": sum(r["diverged"] for r in rows),
        "tails_by_position": mean_bins(rows),
        "book_by_position": mean_bins([r for _, r in tests]),
        "tokens_per_second": spread(r["tokens_per_second"] for r in rows),
        "curve": mean_curve(rows, experiment.tokens_per_step),
    }


def _paired(s: dict[str, Any], own: dict[str, Any] | None) -> dict[str, Any] | None:
    """The difference to the first contender, seed by seed, and its interval by a bootstrap over seeds and windows."""
    if own is None or own is s:
        return None
    shared = [seed for seed in own["book_by_seed"] if s["book_by_seed"].get(seed) and own["book_by_seed"][seed]]
    found = spread(s["book_by_seed"][seed] - own["book_by_seed"][seed] for seed in shared)
    mine, first = s["book_by_window"], own["book_by_window"]
    windows = [[a - b for a, b in zip(mine[seed], first[seed])] for seed in shared if seed in mine and seed in first]
    return found and found | {"interval": bootstrap(windows) if len(windows) > 1 else None}


def table(summary: dict[str, Any]) -> str:
    """The figures as Markdown."""
    header = ["model", "parameters", "lr", "held-out book", "tails", "book - " + summary["first"], "95% interval"]
    bins = next((s["book_by_position"] for s in summary["contenders"] if s["book_by_position"]), None)
    places = [bins[max(0, len(bins) - 4)], bins[-1]] if bins else []
    header += [f"book, bytes {b['first']}-{b['last']}" for b in places]
    rows = []
    for s in summary["contenders"]:
        bins = s["book_by_position"]
        lr = "-" if s["lr"] is None else f"{s['lr']:g}" + ("*" if s["lr_at_edge"] else "")
        ends = [pm(next((b for b in bins if b["first"] == place["first"]), None)) for place in places]
        difference = s["book_minus_first"]
        interval = (difference or {}).get("interval")
        figures = [count(s["parameters"]), lr, pm(s["book"]), pm(s["tails"]), pm(difference)]
        figures.append(f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else "-")
        rows.append([s["contender"], *figures, *ends])
    note = f"\nBits per byte, mean ± standard deviation over seeds, after {count(summary['tokens'])} training bytes; "
    note += "differences are taken seed by seed, their intervals by a bootstrap over seeds and windows of the book.\n"
    if any(s["lr_at_edge"] for s in summary["contenders"]):
        note += "\\* the best learning rate lies at the edge of the grid: a wider grid may be better.\n"
    return markdown(header, rows) + note


def plot(summary: dict[str, Any], path: Path) -> None:
    """Bits per byte of each seed, learning curves, and loss by position."""
    found = [s for s in summary["contenders"] if s["tails"]]
    layer = {s["contender"]: s["contender"].removesuffix(f", {s['optim']}") for s in found}  # a colour each
    palette = dict(zip(sorted(set(layer.values())), cycle((*COLOURS, "#999933", "#000000", "#882255"))))
    colours = {name: palette[own] for name, own in layer.items()}
    lines = {s["contender"]: {"muon": "--", "m3": ":"}.get(s["optim"], "-") for s in found}
    with figure(path, 3, (17, 2.4 + 0.34 * max(8, len(found)))) as (ranks, curves, positions):
        for place, s in enumerate(found):
            for text, shift, marker in (("book", -0.14, "o"), ("tails", 0.14, "s")):
                if s[text]:
                    y = [place + shift] * len(s[text]["values"])
                    fill = {"facecolors": colours[s["contender"]] if text == "book" else "none"}
                    ranks.scatter(s[text]["values"], y, marker=marker, edgecolors=colours[s["contender"]], s=34, **fill)
            x, points = s["curve"]
            style = {"linestyle": lines[s["contender"]]}
            band(curves, [tokens / 1e6 for tokens in x], points, s["contender"], colours[s["contender"]], **style)
            bins = s["book_by_position"] or s["tails_by_position"]
            middle = [(b["first"] * b["last"]) ** 0.5 for b in bins]
            band(positions, middle, bins, s["contender"], colours[s["contender"]], marker=".", **style)
        ranks.set_yticks(range(len(found)), [s["contender"] for s in found])
        ranks.invert_yaxis()
        ranks.set(xlabel="bits per byte (lower is better)", title="Held-out loss, each seed")
        ranks.scatter([], [], color="grey", marker="o", label="held-out book")
        ranks.scatter([], [], facecolors="none", edgecolors="grey", marker="s", label="tails of the training books")
        ranks.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
        curves.set(
            xlabel="training tokens (millions)", ylabel="bits per byte", title="Learning curve (mean and spread)"
        )
        high = max((p["mean"] for s in found for p in s["curve"][1][3:]), default=8)
        low = min((p["mean"] for s in found for p in s["curve"][1]), default=0)
        curves.set_ylim(low - 0.1, high + 0.1)
        curves.legend()
        held_out = "held-out book" if any(s["book"] for s in found) else "tails"
        positions.set(xscale="log", xlabel="position in the context", ylabel="bits per byte")
        positions.set(title=f"Loss by position, {held_out}")
        ticks = [2**i for i in range(1, 20) if 2**i <= max((b["last"] for b in bins), default=2)] if found else []
        positions.set_xticks(ticks, [str(t) for t in ticks])
        positions.minorticks_off()
        edge = max((b["mean"] for s in found for b in (s["book_by_position"] or s["tails_by_position"])[3:]), default=8)
        floor = min((b["mean"] for s in found for b in s["book_by_position"] or s["tails_by_position"]), default=0)
        positions.set_ylim(floor - 0.1, edge + 0.5)
