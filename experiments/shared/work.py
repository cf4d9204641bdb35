"""What the scheduler runs: jobs with a name, and the work that turns one into a row of results."""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nestling.version import __version__

Progress = Callable[[int, float], None]  # step, loss


class Job:
    """One run of a grid. Kinds are frozen dataclasses: hashable, and their fields go into the row."""

    kind: str

    @property
    def key(self) -> str:
        """A readable name, one per job of a kind."""
        raise NotImplementedError

    @property
    def label(self) -> str:
        """The key, and the kind where jobs of several kinds share one."""
        return self.key


Row = Callable[[Any], dict[str, Any] | None]  # the row of a job, None if there is none yet


class Work(ABC):
    """Does jobs: a function of settings and job alone, on one thread. It travels to worker processes by pickle.

    Attributes:
        device: where models and batches go. Results of two devices differ by rounding, so it decides no fingerprint.
        anywhere: whether it heeds `device`.
    """

    device: str = "cpu"
    anywhere: bool = False

    @abstractmethod
    def __call__(self, job: Any, progress: Progress | None = None) -> dict[str, Any]:
        """The job's row of JSON types, with `kind`, `key` and `fingerprint`."""

    @abstractmethod
    def fingerprint(self, job: Any) -> str:
        """A digest of everything that decides the row."""

    @abstractmethod
    def describe(self, job: Any, row: dict[str, Any]) -> str:
        """One line about a finished job."""

    def check(self, contenders: list[Any]) -> None:  # noqa: B027
        """A wrong option of a contender is an error before the first run. By default nothing is checked."""

    def finish(self, contenders: list[Any]) -> None:  # noqa: B027
        """What is measured alone on the machine when no run is missing. By default nothing."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in a fixed order: torch computes on one thread inside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def versions(device: str = "cpu") -> dict[str, str]:
    """What a row was made with; a device is named unless it is a CPU."""
    found = {"torch": torch.__version__, "nestling": __version__}
    return found if device == "cpu" else found | {"device": torch.cuda.get_device_name(device)}


def curve(losses: list[float], points: int) -> list[list[float]]:
    """[step, mean loss up to it] in up to `points` stretches of equal length."""
    length = -(-len(losses) // points)
    return [
        [min(start + length, len(losses)), statistics.fmean(losses[start : start + length])]
        for start in range(0, len(losses), length)
    ]
