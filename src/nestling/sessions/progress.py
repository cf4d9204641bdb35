"""What a person sees while a session reads, or rules are tried: a bar in a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nestling.sessions.calibrate import Trials, Tried
    from nestling.sessions.session import Session

EVERY = 10.0  # seconds between two lines where there is no terminal
REFRESH = 0.2  # and between two changes of the bar


class ReadingProgress:
    """Shows bytes, loss and tokens/s on stderr; call it with the session."""

    def __init__(self, shown: bool = True) -> None:
        from rich.console import Console

        self._console, self._shown = Console(stderr=True), shown
        self._bar: Any = None
        self._task: Any = None
        self._began = self._said = time.monotonic()
        self._tokens: int | None = None

    def __call__(self, session: Session) -> None:
        """Show where the session is."""
        if not self._shown:
            return
        now, notes = time.monotonic(), session.notes
        if self._tokens is None:  # the first call: what a resumed session read before does not count for its speed
            self._tokens, self._began = notes.tokens, now
        wait, last = REFRESH if self._console.is_terminal else EVERY, notes.document == len(session.texts)
        if now - self._said < wait and not (last and self._console.is_terminal):
            return
        self._said = now
        if self._console.is_terminal:
            self._in_terminal(session, self._figures(session, now))
        else:
            total = "" if session.total_bytes is None else f" of {session.total_bytes:,}"
            print(f"{session.read_bytes:,}{total} bytes  {self._figures(session, now)}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Stop the bar."""
        if self._bar is not None:
            self._bar.stop()

    def _figures(self, session: Session, now: float) -> str:
        notes, speed = session.notes, 0.0
        if now > self._began:
            speed = (notes.tokens - self._tokens) / (now - self._began)
        document = min(notes.document + 1, len(session.texts))
        loss = f"  loss {notes.loss.points[-1][2]:.3f}" if notes.loss.points else ""
        documents = f"document {document}/{len(session.texts)}" if len(session.texts) > 1 else ""
        return f"{documents}{loss}  {speed:,.0f} tokens/s"

    def _in_terminal(self, session: Session, figures: str) -> None:
        if self._bar is None:
            from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = [TextColumn("learn"), BarColumn(bar_width=None), DownloadColumn()]
            columns += [TextColumn("{task.fields[figures]}"), TextColumn("left")]
            self._bar = Bar(*columns, TimeRemainingColumn(), console=self._console)
            self._task = self._bar.add_task("learn", total=session.total_bytes, figures="")
            self._bar.start()
        self._bar.update(self._task, completed=session.read_bytes, figures=figures)


class TrialsProgress:
    """Shows on stderr which rules were tried and what the rest may take; call it with the trials."""

    def __init__(self, most: int, shown: bool = True) -> None:
        from rich.console import Console

        self._console, self._shown, self._most = Console(stderr=True), shown, most
        self._bar: Any = None

    def __call__(self, trials: Trials, tried: Tried | None) -> None:
        """A rule was tried, None: the first begins."""
        if not self._shown:
            return
        done = len(trials.tried)
        if tried is None:
            read = len(trials.chosen_on) * len(trials.chosen_on[0])
            self._say(f"at most {self._most} rules, each on {read:,} tokens; {done} of them known from before")
            if self._console.is_terminal:
                from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
                from rich.progress import Progress as Bar

                columns = [TextColumn("calibrate"), BarColumn(bar_width=None), TextColumn("{task.fields[left]}")]
                self._bar = Bar(*columns, TimeElapsedColumn(), console=self._console)
                self._task = self._bar.add_task("calibrate", total=self._most, completed=done, left="")
                self._bar.start()
            return
        seconds = sum(t.seconds for t in trials.tried) / done
        left = f"at most {max(0, self._most - done) * seconds / 60:.1f} minutes left"
        self._say(f"lr {tried.lr:g}, rank {tried.rank}: gain {tried.gain:.3f}, harm {tried.harm:+.3f} "
                  f"bits per byte, {tried.seconds:.0f} s; {left}")  # fmt: skip
        if self._bar is not None:
            self._bar.update(self._task, completed=done, left=left)

    def close(self) -> None:
        """Stop the bar."""
        if self._bar is not None:
            self._bar.stop()

    def _say(self, line: str) -> None:
        self._bar.console.print(line) if self._bar is not None else print(line, file=sys.stderr, flush=True)
