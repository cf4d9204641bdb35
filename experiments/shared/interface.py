"""What `experiments/NAME/experiment.py` has to define, and how it is found by name."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Protocol, cast

from experiments import catalog
from experiments.shared.work import Row, Work
from nestling.training.config import unknown


class Experiment(Protocol):
    """The names of an experiment's module; `experiments.shared.run` knows nothing else of it.

    Attributes:
        GROUP: the heading under which `nestling eval --list` shows it.
        QUESTION: what it asks, in one line.
        ENTRIES: the key of the summary that holds the list of what was found; optional, "contenders" if it is absent.
        paper: optional, a function without arguments that gives `experiments.shared.models.paper.PaperRun`s.
    """

    GROUP: str
    QUESTION: str

    def defaults(self) -> Any:
        """The settings, as they are before anybody changes them: a dataclass of `nestling.training.config.Settings`
        with `name`, `out`, `contenders` (each with a `name`), `stored()` and `smoke()`."""

    def work(self, settings: Any, data: str | Path | None, smoke: bool) -> Work:
        """What does the jobs; `data` is the folder that the user named."""

    def plan(self, settings: Any, contenders: list[Any], row: Row) -> list[Any]:
        """Every job that the results so far call for, done or not, most urgent first."""

    def summarize(self, settings: Any, contenders: list[Any], row: Row) -> dict[str, Any]:
        """The figures, as JSON types."""

    def table(self, summary: dict[str, Any]) -> str:
        """The summary as Markdown."""

    def plot(self, summary: dict[str, Any], path: Path) -> None:
        """The summary as a PNG."""


def find(name: str) -> Experiment:
    """The experiment of that name.

    Raises:
        ValueError: there is none; the message lists all.
    """
    if name not in catalog.names():
        raise ValueError(f"{unknown('experiment', name, catalog.names())}\n\n{catalog.listing()}")
    return cast(Experiment, importlib.import_module(f"experiments.{name}.experiment"))


def folder_of(name: str) -> Path:
    """Where an experiment's code and results are."""
    return catalog.HERE / name


def entries(experiment: Experiment, summary: dict[str, Any]) -> list[Any]:
    """What a summary found; empty if there are no results."""
    return summary[getattr(experiment, "ENTRIES", "contenders")]
