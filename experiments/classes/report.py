"""Table and figure of the class-incremental experiment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.classes.jobs import plan
from experiments.classes.small_models import OURS
from experiments.shared.report import COLOURS, band, figure, markdown, pm, spread

MEASURES = ("final", "mean", "forgetting")


def summarize(settings: Any, contenders: list[Any], row: Callable) -> dict[str, Any]:
    """Means and spreads over seeds of every contender on every data set."""
    jobs, groups = plan(settings, contenders, row), []
    for data in settings.data:
        for c in contenders:
            rows = [r for j in jobs if (j.contender, j.data) == (c.name, data) and (r := row(j))]
            if not rows:
                continue
            found: dict[str, Any] = {"contender": c.name, "data": data, "runs": len(rows), "method": c.method}
            model = c.options.get("model", settings.model)
            found["model"] = "a small model of ours" if model in OURS else model
            for variant in ("plain", "calibrated"):
                found[variant] = {m: spread(r[variant][m] for r in rows) for m in MEASURES}
                stages = zip(*(r["stages"] for r in rows))
                found[variant]["curve"] = [
                    {"classes": s[0]["classes"]} | spread(x[variant]["all"] for x in s) for s in stages
                ]
            found["parameters"] = rows[0]["parameters"]
            found |= {k: spread(r[k] for r in rows) for k in ("forwards", "backwards", "seconds")}
            groups.append(found)
    keys = ("shots", "tests", "window", "data")
    return {"experiment": "classes", "seeds": len(settings.seeds)} | {k: getattr(settings, k) for k in keys} | {
        "groups": groups
    }  # fmt: skip


def table(summary: dict[str, Any]) -> str:
    """One table for each data set and model."""
    header = ["learner", "accuracy at the end", "forgetting", "calibrated: at the end", "over the stream", "forgetting",
              "weights it changes", "k tokens forward", "backward", "s"]  # fmt: skip
    text = ""
    for data, model in dict.fromkeys((g["data"], g["model"]) for g in summary["groups"]):
        rows = []
        for g in summary["groups"]:
            if (g["data"], g["model"]) == (data, model):
                cells = [pm(g["plain"]["final"]), pm(g["plain"]["forgetting"])]
                cells += [pm(g["calibrated"][m]) for m in MEASURES]
                cost = [f"{g[k]['mean'] / 1000:.1f}" for k in ("forwards", "backwards")]
                rows.append([g["contender"], *cells, f"{g['parameters']:,}", *cost, f"{g['seconds']['mean']:.0f}"])
        text += f"{data}, {model}:\n\n" + markdown(header, rows) + "\n"
    text += f"Mean ± standard deviation over up to {summary['seeds']} seeds (orders of classes, texts). Every class is "
    text += f"met in {summary['shots']} examples, once, and tested on {summary['tests']} texts; at the end over all "
    text += "classes. Forgetting: a group's best earlier accuracy minus its last, mean over groups. Calibrated: each "
    text += "name's log-probability after texts without content is subtracted. Attention reaches "
    text += f"{summary['window']:,} tokens. Tokens: of learning, through the whole model; seconds: learning and tests, "
    text += "on one thread.\n"
    return text


def plot(summary: dict[str, Any], path: Path) -> None:
    """Calibrated accuracy over the classes seen, and over accuracy at the end what was forgotten."""
    places = list(dict.fromkeys((g["data"], g["model"]) for g in summary["groups"]))
    names = list(dict.fromkeys(g["contender"] for g in summary["groups"]))
    with figure(path, len(places), (6.2 * len(places) + 2.5, 5)) as axes:
        for axis, (data, model) in zip(axes, places):
            shown = [g for g in summary["groups"] if (g["data"], g["model"]) == (data, model)]
            for g in shown:
                n = names.index(g["contender"])
                curve = g["calibrated"]["curve"]
                style = {"linestyle": ("-", "--", ":")[n // len(COLOURS) % 3], "marker": "o", "markersize": 3}
                band(axis, [c["classes"] for c in curve], curve, g["contender"], COLOURS[n % len(COLOURS)], **style)
            axis.set(title=f"{data}, {model}", xlabel="classes seen", ylabel="accuracy over all seen (calibrated)")
            axis.set_ylim(bottom=0)
        handles = {h: l for axis in axes for h, l in zip(*axis.get_legend_handles_labels())}
        unique = {label: handle for handle, label in handles.items()}
        axes[-1].legend(unique.values(), unique, loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=9)
