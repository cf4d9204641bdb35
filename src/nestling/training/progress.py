"""What a person sees while a run goes on: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nestling.training.report import Report


class TrainingProgress:
    """Shows steps, loss, bits per byte, tokens/s and the time left on stderr.

    Args:
        steps: of the whole run.
        done: steps taken before (a resumed run).
        label: what stands in front of the bar.
        log_every: without a terminal, one line per so many steps.
        shown: False shows nothing but warnings.
    """

    def __init__(
        self, steps: int, done: int = 0, label: str = "train", log_every: int = 10, shown: bool = True
    ) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._steps, self._done, self._log_every, self._shown = steps, done, max(1, log_every), shown
        self._started = time.monotonic()
        self._held_out = ""
        self._bar = self._task = None
        if shown and self._console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = [
                TextColumn(label),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
            ]
            self._bar = Bar(
                *columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=self._console
            )
            self._task = self._bar.add_task(label, total=steps, completed=done, figures="")
            self._bar.start()

    def step(self, report: Report) -> None:
        """Show a training step."""
        figures = (
            f"loss {report.loss:.3f}  {report.bits_per_byte:.3f} bits/byte  {report.tokens_per_second:,.0f} tokens/s"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=report.step, figures=figures + self._held_out)
        elif self._shown and (report.step % self._log_every == 0 or report.step == self._steps):
            left = (time.monotonic() - self._started) / max(1, report.step - self._done) * (self._steps - report.step)
            print(
                f"step {report.step}/{self._steps}  {figures}{self._held_out}  {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def held_out(self, bits_per_byte: float) -> None:
        """Show the newest held-out figure from now on."""
        self._held_out = f"  held out {bits_per_byte:.3f}"

    def say(self, text: str) -> None:
        """Print a line above the bar, shown also when quiet (it is a warning)."""
        self._console.print(text, style="yellow", highlight=False, markup=False)

    def close(self) -> None:
        """Stop the bar."""
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def bytes_bar(label: str, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Shows bytes done of all, by a bar in a terminal and by a line every ten seconds elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        said = time.monotonic()

        def line(done: int, size: int) -> None:
            nonlocal said
            if not quiet and time.monotonic() - said > 10:
                said = time.monotonic()
                print(f"{label}: {done / 1e6:,.0f} of {size / 1e6:,.0f} MB", file=sys.stderr, flush=True)

        yield line
        return
    columns = TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(label)
        yield lambda done, size: bar.update(task, completed=done, total=size)


class Silence:
    """Where the figures and words of the ranks other than the first go."""

    def __getattr__(self, name: str):
        return lambda *_, **__: None
