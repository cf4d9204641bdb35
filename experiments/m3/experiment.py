"""What M3's choices are worth: one change at a time from its defaults, on the images of `vision`.

A change of the size or kind of the step has a search for the learning rate of its own; the others take the default's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from experiments.shared.optimizers import comparison
from experiments.shared.optimizers.comparison import Model
from experiments.shared.optimizers.comparison_report import summarize
from experiments.shared.optimizers.contenders import GRADIENT, M3, OptimizerContender
from experiments.shared.report import COLOURS, count, figure, markdown, pm
from experiments.vision import experiment as vision
from experiments.vision.experiment import Vision

GROUP = "Optimisers (on data)"
QUESTION = "Which of M3's choices matter?"

__all__ = ["defaults", "plan", "plot", "summarize", "table", "work"]

plan, work = comparison.plan, vision.work


@dataclass
class Choices(Vision):
    """`Vision` with M3's settings as contenders, the default first."""

    name: str = "m3"
    judged_on: ClassVar[str] = "validation"  # defaults are chosen here: the test images stay unseen


CHANGES: dict[str, dict[str, Any]] = {
    "default": {},
    "second moment of the gradient": GRADIENT,
    "one scale": {"periods": [1]},
    "period 4": {"periods": [1, 4]},
    "period 64": {"periods": [1, 64]},
    "three scales (1, 8, 64)": {"periods": [1, 8, 64]},
    "alpha 0.1": {"alpha": 0.1},
    "alpha 1": {"alpha": 1.0},
    "sum": GRADIENT | {"accumulation": "sum", "nesterov": False},
    "no second moment": {"second_moment": False},
    "no Nesterov": {"nesterov": False},
    "3 Newton-Schulz steps": {"ns_steps": 3},
    "Polar Express": {"coefficients": "polar_express"},
    "cubic Newton-Schulz": {"coefficients": "cubic"},
    "Muon (one scale, no second moment)": {"periods": [1], "second_moment": False},
}
SEARCHED = [
    "default",
    "second moment of the gradient",
    "sum",
    "no second moment",
    "Muon (one scale, no second moment)",
    "NorMuon",
]


def defaults() -> Choices:
    """The experiment's settings."""
    contenders = [OptimizerContender(name, "m3", M3 | options) for name, options in CHANGES.items()]
    return Choices(
        contenders=[*contenders, OptimizerContender("NorMuon", "normuon")],
        searched=SEARCHED,
        models=[Model("vit", {"width": 64, "layers": 3, "heads": 4}, trials=3, steps=200, equal_time=False)],
    )


def table(summary: dict[str, Any]) -> str:
    """Each change against the default, as Markdown."""
    header = ["M3 with", "lr", "held-out loss", "- default", "held-out accuracy", "train loss", "optimiser ms/step"]
    rows = []
    for c in summary["contenders"]:
        lr = "-" if c["lr"] is None else f"{c['lr']:g}" + ("*" if c["lr_at_edge"] else "")
        name = c["contender"] + (f" ({c['failed']} of {c['runs']} failed)" if c["failed"] else "")
        speed = "-" if c["optimizer_seconds"] is None else f"{1000 * c['optimizer_seconds']:.1f}"
        figures = [pm(c["loss"], 4), pm(c["difference"], 4), pm(c["accuracy"]), pm(c["train_loss"], 4), speed]
        rows.append([name, lr, *figures])
    model = summary["models"][0]
    note = f"\n{count(summary['contenders'][0]['parameters'])} parameters, {model['steps']} steps of "
    note += f"{summary['batch_size']} images; mean ± standard deviation over {summary['seeds']} seeds, differences "
    note += "seed by seed. All is judged on held-out training images; the test images stay unseen. The rates are "
    note += f"the best of {model['trials']} trials: searched for the settings that change the size or the kind of the "
    note += "step, the default's for the others.\n"
    if any(c["lr_at_edge"] for c in summary["contenders"]):
        note += "\\* the best learning rate is the smallest or largest that was tried.\n"
    return markdown(header, rows) + note


def plot(summary: dict[str, Any], path: Path) -> None:
    """The held-out loss of every seed, beside the range of the default's."""
    found = [c for c in summary["contenders"] if c["loss"]]
    base = found[0]["loss"] if found else None
    with figure(path, 1, (8.5, 1.4 + 0.34 * len(found))) as (axis,):
        for place, c in enumerate(found):
            colour = COLOURS[1] if place == 0 else COLOURS[0]
            axis.scatter(c["loss"]["values"], [place] * len(c["loss"]["values"]), s=16, color=colour, alpha=0.6)
            axis.scatter([c["loss"]["mean"]], [place], s=90, color=colour, marker="|", linewidths=2.5)
        if base:
            low, high = min(base["values"]), max(base["values"])
            axis.axvspan(low, high, color=COLOURS[1], alpha=0.12, label="range of the default's seeds")
            axis.legend(loc="best")
        axis.set_yticks(range(len(found)), [c["contender"] for c in found])
        axis.invert_yaxis()
        axis.set(xlabel="loss on held-out training images (lower is better)", title="M3, one choice changed at a time")
