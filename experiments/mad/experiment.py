"""NL Table 4: which layers compress, recall, copy and memorise, in the tasks of MAD?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from experiments.choice.experiment import DELTA, FIRST, HOPE, PLAIN, TWO_KINDS, beside, horizon
from experiments.mad.tasks import TASKS
from experiments.shared.models.tasks import Task, TaskContender, TaskStudy, TaskWork, plan
from experiments.shared.models.tasks_report import plot, summarize, table

GROUP = "Models"
QUESTION = "Which layers compress, recall, copy and memorise (MAD)?"

__all__ = ["defaults", "plan", "plot", "summarize", "table", "work"]

# as `mixer="gated_deltanet"` has it: one convolution of the input, nothing begins small
GATED = DELTA | dict(initial_scale=1.0, conv_for="all", qkv_conv=0)


@dataclass
class Mad(TaskStudy):
    """The tasks of MAD that the paper reports."""

    known: ClassVar[Mapping[str, Task]] = TASKS
    name: str = "mad"
    tasks: list[str] = field(default_factory=lambda: list(TASKS))


def defaults() -> Mad:
    """The experiment's settings."""
    window = {"mixer": "window_attention", "window": 256}
    contenders = [
        TaskContender("Hope", mixers=[window, beside(TWO_KINDS)]),
        TaskContender("fourth default", mixers=[window, beside(HOPE | horizon(2048, 32768))]),
        TaskContender("Hope's memory alone", options=HOPE),
        TaskContender("first default", options=FIRST, head_size=32),
        TaskContender("attention", "attention", head_size=32),
        TaskContender("attention, plain", "attention", PLAIN, head_size=32),
        TaskContender("gated DeltaNet", options=GATED),
    ]
    return Mad(contenders=contenders, seeds=[0, 1, 2])


def work(settings: Mad, data: str | Path | None, smoke: bool) -> TaskWork:
    """What trains; all is drawn, nothing is read."""
    return TaskWork(settings)
