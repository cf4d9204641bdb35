"""What a person sees while the two models train: two bars in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY = 15.0  # seconds between two lines where there is no terminal
SMOOTHING = 0.9  # of the loss shown


class Watch:
    """Shows both models' steps, loss and speed on stderr.

    Args:
        names: of the models.
        console: where to (a `rich` console); None is stderr.
    """

    def __init__(self, names: list[str], console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self._names = names
        self._loss: dict[str, float] = {}
        self._held_out: dict[str, float] = {}
        self._bars: Progress | None = None
        self._tasks: dict[str, Any] = {}
        self._spoke = time.monotonic()

    def say(self, text: str, style: str | None = None) -> None:
        """Print a line (above the bars)."""
        self.console.print(text, style=style, markup=False, soft_wrap=True)

    def start(self, steps: int) -> None:
        """Show the bars."""
        if self.console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            width = max(map(len, self._names))
            self._tasks = {n: self._bars.add_task(n.ljust(width), total=steps, figures="") for n in self._names}
            self._bars.start()

    def plan(self, steps: int) -> None:
        """The number of steps has changed."""
        for task in self._tasks.values():
            self._bars.update(task, total=steps)

    def step(self, name: str, report: dict[str, Any]) -> None:
        """A model has taken a step."""
        before = self._loss.get(name, report["bits"])
        self._loss[name] = SMOOTHING * before + (1 - SMOOTHING) * report["bits"]
        if self._bars is not None:
            speed = report["tokens"] / max(report["seconds"], 1e-9)
            held_out = f"  held out {self._held_out[name]:.3f}" if name in self._held_out else ""
            figures = f"{self._loss[name]:.3f} bits/byte{held_out}  {speed:,.0f} B/s"
            self._bars.update(self._tasks[name], completed=report["step"], figures=figures)

    def held_out(self, name: str, bits: float) -> None:
        """Show a model's newest held-out figure from now on."""
        self._held_out[name] = bits

    def line(self, step: int, steps: int, last: bool = False) -> None:
        """Without a terminal: now and then a line with both."""
        if self._bars is None and (last or time.monotonic() - self._spoke > LINE_EVERY):
            self._spoke = time.monotonic()
            both = "   ".join(f"{name} {self._loss[name]:.3f}" for name in self._names)
            self.say(f"step {step}/{steps}   bits per byte: {both}")

    def stop(self) -> None:
        """Take the bars down, leaving their last state."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
