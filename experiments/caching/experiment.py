"""What memories kept along a text (`cache_every`, decision D38) add to recall, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from experiments.caching.cost import cost_of
from experiments.caching.report import cost_job, plot, summarize, table
from experiments.caching.tasks import TASKS
from experiments.choice.experiment import TWO_KINDS
from experiments.shared.models import tasks
from experiments.shared.models.drawn import size
from experiments.shared.models.tasks import (
    Logits,
    Task,
    TaskContender,
    TaskJob,
    TaskStudy,
    TaskWork,
    configuration,
    tested,
    trained,
)
from experiments.shared.work import Progress, Row, curve
from nestling.models import HopeConfig, HopeForCausalLM

GROUP = "Models"
QUESTION = "What does Hope recall of many pairs if it keeps what each stretch of a text wrote to its memory?"

__all__ = ["defaults", "plan", "plot", "summarize", "table", "work"]

WINDOW = 32  # of attention: what is asked for lies beyond it
PLAIN = f"Hope, window {WINDOW}"


@dataclass
class CachingContender(TaskContender):
    """`afterwards`: options of its memory with which it is tested once more when it is trained."""

    afterwards: dict[str, Any] = field(default_factory=dict)


@dataclass
class Caching(TaskStudy):
    """Recall of pairs, and the cost of texts of some lengths."""

    contenders: list[CachingContender] = field(default_factory=list)
    known: ClassVar[Mapping[str, Task]] = TASKS
    name: str = "caching"
    tasks: list[str] = field(default_factory=lambda: ["pairs"])
    steps: int = 1600
    lengths: list[int] = field(default_factory=lambda: [1024, 4096])
    """Tokens after which a state is measured, and the next token timed."""

    def smoke(self) -> TaskStudy:
        return super().smoke().changed(lengths=[24, 48])


class CachingWork(TaskWork):
    settings: Caching

    def run(self, job: TaskJob, progress: Progress | None) -> dict[str, Any]:
        """Recall after training; or the cost, which no weight decides, of a fresh model of the same configuration."""
        settings = self.settings
        contender: CachingContender = settings.contender(job.contender)
        if job.kind == "cost":
            return cost_of(configuration(settings, contender, 2), settings.lengths)
        task = settings.known[job.task]
        model, losses = trained(settings, contender, task, job.seed, progress, self.device)
        row = {"parameters": size(model), "accuracy": tested(settings, model, task, job.seed)}
        if contender.afterwards:
            changed = with_memory(model.model, contender.afterwards).to(self.device)
            row["afterwards"] = tested(settings, Logits(changed), task, job.seed)
        return row | {"curve": curve(losses, 30)}

    def result(self, row: dict[str, Any]) -> str:
        return "measured" if row["kind"] == "cost" else super().result(row)


def defaults() -> Caching:
    """The experiment's settings."""
    contenders = [
        CachingContender(PLAIN, mixers=hope({}), afterwards={"cache_every": 64, "cache_scale": 32.0}),
        CachingContender(f"{PLAIN}, kept every 64", mixers=hope({"cache_every": 64})),
        CachingContender("attention to all", "attention", head_size=32),
    ]
    return Caching(contenders=contenders, seeds=[0, 1, 2])


def plan(settings: Caching, contenders: list[CachingContender], row: Row) -> list[TaskJob]:
    """As of all drawn tasks, and what each contender costs."""
    return [*tasks.plan(settings, contenders, row), *(cost_job(contender.name) for contender in contenders)]


def hope(options: dict[str, Any]) -> list[dict[str, Any]]:
    """The default Hope with a short window, its memory with these options."""
    memory = {"mixer": "memory_and_attention", "window": WINDOW} | TWO_KINDS | options
    return [{"mixer": "window_attention", "window": WINDOW}, memory]


def with_memory(model: HopeForCausalLM, options: dict[str, Any]) -> HopeForCausalLM:
    """A trained model whose memory has other options, what they add at its beginning."""
    mixers = [own | options if own["mixer"] == "memory_and_attention" else own for own in model.config.mixers]
    changed = HopeForCausalLM(HopeConfig.from_dict(model.config.to_dict() | {"mixers": mixers}))
    changed.load_state_dict(model.state_dict(), strict=False)
    return changed


def work(settings: Caching, data: str | Path | None, smoke: bool) -> CachingWork:
    """What trains; all is drawn, nothing is read."""
    return CachingWork(settings)
