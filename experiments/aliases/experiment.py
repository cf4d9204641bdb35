"""Why a projection that learns in the context pays: names that are given in the sequence, and change in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from experiments.aliases.tasks import TASKS
from experiments.choice.experiment import DELTA, FIRST, HOPE, beside, horizon
from experiments.shared.models.tasks import Task, TaskContender, TaskStudy, TaskWork, plan
from experiments.shared.models.tasks_report import plot, summarize, table

GROUP = "Models"
QUESTION = "Where do projections that learn in the context pay?"

__all__ = ["defaults", "plan", "plot", "summarize", "table", "work"]

STATIC = DELTA | dict(chunk_size=4)
# one memory more, which maps a key to what stands beside it
ADAPTIVE = STATIC | dict(adaptive=["k"], retain="initial", projection_init="identity")
# convolutions that begin by passing the token itself on
LAST = dict(conv_init="last")


@dataclass
class Aliases(TaskStudy):
    """One task: what a name stands for is said in the sequence."""

    known: ClassVar[Mapping[str, Task]] = TASKS
    name: str = "aliases"
    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    layers: int = 1
    parameters: int = 80_000
    steps: int = 1000


def defaults() -> Aliases:
    """The experiment's settings."""

    def first(**changes: Any) -> dict[str, Any]:
        return FIRST | dict(chunk_size=4, qkv_conv=4, conv_for="gates", initial_rate=0.5) | changes

    window = {"mixer": "window_attention", "window": 256}
    hope = beside(HOPE | horizon(2048, 32768)) | dict(chunk_size=4)
    adaptive = hope | dict(adaptive=["k"], retain="initial", projection_init="identity")
    contenders = [
        TaskContender("static", options=STATIC),
        TaskContender("adaptive k", options=ADAPTIVE),
        TaskContender("static, 2 layers", options=STATIC, layers=2),
        TaskContender("attention, 2 layers", "attention", head_size=32, layers=2),
        TaskContender("default Hope, 2 layers", mixers=[window, hope], layers=2),
        TaskContender("default Hope, adaptive k, 2 layers", mixers=[window, adaptive], layers=2),
        TaskContender("adaptive k, 2000 steps", options=ADAPTIVE, steps=2000),
        TaskContender("static, 4000 steps", options=STATIC, steps=4000),
        TaskContender("adaptive k, random at first", options=ADAPTIVE | dict(projection_init="random")),
        TaskContender("attention", "attention", head_size=32),
        TaskContender("adaptive k, 2 layers", options=ADAPTIVE, layers=2),
        TaskContender("adaptive k, near identity", options=ADAPTIVE | LAST),
        TaskContender("static, near identity", options=STATIC | LAST),
        TaskContender("adaptive k, near identity, 2000 steps", options=ADAPTIVE | LAST, steps=2000),
        TaskContender("first default", options=first()),
        TaskContender("first default, static", options=first(adaptive=[])),
    ]
    return Aliases(contenders=contenders, seeds=[0, 1, 2])


def work(settings: Aliases, data: str | Path | None, smoke: bool) -> TaskWork:
    """What trains; all is drawn, nothing is read."""
    return TaskWork(settings)
