"""A pipe that can be read again: what came out of it since the last checkpoint is on the disk before it is learned."""

from __future__ import annotations

import json
import os
import select
from codecs import BOM_UTF8
from pathlib import Path
from threading import Event
from typing import BinaryIO

from nestling.utils.files import write_bytes

WAIT = 0.2  # seconds between two looks whether to stop
LIMIT = 1 << 22  # bytes a journal may hold before what a checkpoint has passed is dropped


class Stopped(Exception):
    """A request to stop was followed."""


class Journal:
    """Reads a pipe, through a file beside the state.

    The file is one line of JSON (`session`, and `start`, the offset in the pipe of what follows) and then bytes as they
    came. A line of another session, or none, begins a new file.

    Args:
        path: of the file.  session: the session it belongs to.  pipe: where new bytes come from.
        offset: in the pipe, of the first byte to read.  stop: ends a wait for new bytes.
    """

    def __init__(self, path: Path, session: str, pipe: BinaryIO, offset: int = 0, stop: Event | None = None) -> None:
        self._path, self._session, self._pipe, self._stop = path, session, pipe, stop
        head = self._head() if path.is_file() else None
        if head is None:
            self._start, self._skip = offset, self._write(offset, b"")
        else:
            self._start, self._skip = head
        self._file = path.open("r+b")
        self._file.seek(self._skip + offset - self._start)
        self.fresh = False  # whether all that was in the file has been read

    def _head(self) -> tuple[int, int] | None:
        with self._path.open("rb") as file:
            line = file.readline(200)
        try:
            head = json.loads(line)
            return (head["start"], len(line)) if head["session"] == self._session else None
        except (ValueError, KeyError, TypeError):
            return None

    def _write(self, start: int, content: bytes) -> int:
        line = json.dumps({"session": self._session, "start": start}).encode() + b"\n"
        write_bytes(self._path, line + content)
        return len(line)

    def read(self, count: int) -> bytes:
        """At most `count` bytes: first those read before, then new ones, which are on the disk when this returns.

        Raises:
            Stopped: `stop` was set before any came.
        """
        if not self.fresh:
            if found := self._file.read(count):
                return found
            self.fresh = True
        found = self._come(count)
        if self._start + self._file.tell() == self._skip:  # a byte order mark at the beginning is no text
            while len(found) < len(BOM_UTF8) and BOM_UTF8.startswith(found) and (more := self._come(count)):
                found += more
            found = found.removeprefix(BOM_UTF8) or (self._come(count) if found else found)
        if found:
            self._file.write(found)
            self._file.flush()
            os.fsync(self._file.fileno())
        return found

    def _come(self, count: int) -> bytes:
        """What comes out of the pipe next."""
        try:
            handle = self._pipe.fileno()
        except (OSError, AttributeError):  # not one of the system's
            return self._pipe.read(count)
        while not select.select([handle], [], [], WAIT)[0]:
            if self._stop is not None and self._stop.is_set():
                raise Stopped
        return os.read(handle, count)

    def trim(self, offset: int) -> None:
        """Drop what lies before an offset that a checkpoint has passed, once there is much of it."""
        if not self.fresh or offset - self._start < LIMIT:
            return
        self._file.seek(self._skip + offset - self._start)
        rest = self._file.read()
        self._file.close()
        self._start, self._skip = offset, self._write(offset, rest)
        self._file = self._path.open("r+b")
        self._file.seek(0, os.SEEK_END)

    def close(self, remove: bool = False) -> None:
        """Close the file; a document that was read to its end needs none any more."""
        self._file.close()
        if remove:
            self._path.unlink(missing_ok=True)
