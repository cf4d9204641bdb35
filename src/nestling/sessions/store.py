"""The state and the session's notes in one file, whole or absent, which `load_state` reads as any other state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from nestling.cms.cache import LevelsCache
from nestling.generation import load_notes, load_state, save_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = "nestling-reading-1"


def save(path: Path, cache: LevelsCache, model: PreTrainedModel, origin: str, notes: dict[str, Any]) -> None:
    """Replace the file in one step; `origin` is the model's fingerprint."""
    save_state(path, cache, model, notes={"format": FORMAT, "reading": notes}, origin=origin)


def load(path: Path, model: PreTrainedModel) -> tuple[LevelsCache, dict[str, Any] | None]:
    """The state in a file and the notes beside it, None in a file that no reading session wrote.

    Raises:
        ValueError: a damaged file, or the state of another model.
    """
    cache, kept = load_state(path, model), load_notes(path)
    if not isinstance(cache, LevelsCache):  # nothing was read yet
        cache = LevelsCache()
    if kept is not None and kept.get("format") != FORMAT:
        raise ValueError(f"{path} holds a reading session of another version: start without it")
    return cache, None if kept is None else kept["reading"]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Inside, no other session writes this file; the system lets go of it when a process dies.

    Raises:
        ValueError: another session is at it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(path.name + ".lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"{path} is being written by another session: wait for it, or name another file") from None
    try:
        yield
    finally:
        lock.release()
