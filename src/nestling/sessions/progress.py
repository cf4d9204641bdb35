"""What a person sees while a session reads: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nestling.sessions.session import Session

EVERY = 10.0  # seconds between two lines where there is no terminal
REFRESH = 0.2  # and between two changes of the bar


class ReadingProgress:
    """Shows bytes, loss and tokens/s on stderr; call it with the session."""

    def __init__(self, shown: bool = True) -> None:
        from rich.console import Console

        self._console, self._shown = Console(stderr=True), shown
        self._bar = self._task = None
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
