"""What a part measures goes to disk at once: a part that is stopped loses nothing that it had found."""

from __future__ import annotations

import json
import math
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FRAMES = 4  # of an exception, the last ones


class TookTooLong(BaseException):
    """Past its time. No Exception, so that no library on the way catches it."""


class Record:
    """Tables of one part, rewritten to a file after each entry.

    Args:
        path: the file.
        seconds: time of the part once it is its turn; entries that would begin later are left out, and named.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.seconds = path, seconds
        self.begin, self.end = time.monotonic(), math.inf
        self.tables: dict[str, Any] = {}

    def start(self) -> None:
        """The part's time begins."""
        self.begin = time.monotonic()
        self.end = self.begin + self.seconds

    @property
    def left(self) -> float:
        """Seconds until the part's end."""
        return self.end - time.monotonic()

    def put(self, table: str, key: str, value: Any) -> None:
        """Keep a value."""
        self.tables.setdefault(table, {})[key] = value
        self.tables["seconds"] = round(time.monotonic() - self.begin, 1)
        write_json(self.path, self.tables)

    def attempt(self, table: str, key: str, function: Callable[[], Any], seconds: float = 60.0) -> Any:
        """Keep what a function returns, or how it failed; returns it, or None where it failed or was left out."""
        if self.left < 1:
            self.put(table, key, {"left out": "no time"})
            return None
        begin, value, failed = time.monotonic(), None, None
        try:
            with limit(min(seconds, self.left)):
                value = function()
        except (Exception, TookTooLong) as error:
            failed = describe(error)
        if failed is not None:
            print(f"{table}: {key}: {failed['exception']}", flush=True)
            self.put(table, key, failed | {"after seconds": round(time.monotonic() - begin, 2)})
            return None
        self.put(table, key, value)
        return value


def describe(error: BaseException) -> dict[str, Any]:
    """An exception and its last frames, ready for JSON."""
    frames = traceback.extract_tb(error.__traceback__)[-FRAMES:]
    text = f"{type(error).__name__}: {error}".strip()
    lines = [f"{'/'.join(Path(f.filename).parts[-3:])}:{f.lineno} {f.name}: {f.line}" for f in frames]
    return {"exception": text[:600], "frames": lines}


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """TookTooLong inside after so many seconds, as soon as Python runs."""

    def stop(*_: Any) -> None:
        raise TookTooLong(f"took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(0.01, min(seconds, 3600.0)))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(json.dumps(_plain(value), indent=1) + "\n")
    os.replace(temporary, path)


def _plain(value: Any) -> Any:
    """Numbers to six digits; what JSON has no number for as text."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value
