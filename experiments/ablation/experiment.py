"""NL Table 6 with the default Hope: what is each part of its rule worth, in language and for a state?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.choice.experiment import HOPE, beside, horizon, plan
from experiments.choice.report import plot, summarize, table
from experiments.choice.study import Choice, ChoiceContender, ChoiceWork

GROUP = "Models"
QUESTION = "What is each part of the default Hope's rule worth?"

__all__ = ["defaults", "plan", "plot", "summarize", "table", "work"]

MEMORY = HOPE | horizon(2048, 32768)
# no erase, so no gate for it: a write remains, its step from a gate of its own
NO_ERASE = dict(dgd=False, erase_gate=False, erase_range=1.0, initial_erase=0.5, conv_for=["gate", "eta", "alpha"])
# a projection is a memory, at first the identity with a small rate of its own: the layer begins as the default
ADAPTIVE = dict(retain="initial", projection_init="identity", projection_rate=0.02)


def defaults() -> Choice:
    """The experiment's settings."""
    window = {"mixer": "window_attention", "window": 256}
    changes: dict[str, dict[str, Any]] = {
        "default": {},
        "no erase (DGD)": NO_ERASE,
        "no decay": dict(decay="none", conv_for=["gate", "eta"]),
        "with momentum": dict(momentum=True),
        "adaptive k": ADAPTIVE | dict(adaptive=["k"]),
        "adaptive v": ADAPTIVE | dict(adaptive=["v"]),
        "adaptive q": ADAPTIVE | dict(adaptive=["q"]),
    }
    contenders = [
        ChoiceContender(name, mixers=[window, beside(MEMORY | change)], text_lr=5e-3)
        for name, change in changes.items()
    ]
    contenders.append(ChoiceContender("no memory", mixers=[window], text_lr=5e-3))
    short = {"window": 64}  # attention that does not see all of what is trained on
    contenders.append(ChoiceContender("window of 64", mixers=[window | short, beside(MEMORY) | short], text_lr=5e-3))
    return Choice(name="ablation", contenders=contenders, tasks=["parity", "recall", "text 400"], seeds=[0, 1, 2])


def work(settings: Choice, data: str | Path | None, smoke: bool) -> ChoiceWork:
    """What trains; parity and pairs are drawn, the text is the standard library's sources."""
    return ChoiceWork(settings)
