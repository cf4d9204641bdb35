"""What the scheduler runs: jobs with a name, and the work that turns one into a row of results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from nestling.version import __version__

Tell = Callable[[int, float], None]  # step, loss


class Job(Protocol):
    """One run of a grid; hashable."""

    kind: str

    @property
    def key(self) -> str:
        """A readable name, one per job of a kind."""


class Work(Protocol):
    """Does jobs: a function of settings and job alone, on one thread. It travels to worker processes by pickle."""

    def __call__(self, job: Job, tell: Tell | None = None) -> dict[str, Any]:
        """The job's row of JSON types, with `kind`, `key` and `fingerprint`."""

    def fingerprint(self, job: Job) -> str:
        """A digest of everything that decides the row."""

    def told(self, job: Job, row: dict[str, Any]) -> str:
        """One line about a finished job."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in a fixed order: torch computes on one thread inside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def versions() -> dict[str, str]:
    """What a row was made with."""
    return {"torch": torch.__version__, "nestling": __version__}
