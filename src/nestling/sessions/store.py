"""The state and the session's notes in one file, whole or absent, which `load_state` reads as any other state."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes whenever the file is replaced; None where there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
