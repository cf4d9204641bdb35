"""Where things lie: paths as a user names them, and the folder for what can be made again."""

from __future__ import annotations

import difflib
import os
import stat
import sys
import tempfile
from pathlib import Path


def expand(path: str | Path, what: str = "a path") -> Path:
    """The path with ~ for a home. ValueError for an empty one and for a home that is not known."""
    if not str(path):
        raise ValueError(f"{what} is empty: name a file or folder")
    if "\0" in str(path):
        raise ValueError(f"{what} holds a NUL character, which no path does: {str(path)!r}")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(
            f"{what} {str(path)!r}: there is no such user, or the home is not known; write it out"
        ) from None


def file_to_write(path: str | Path, what: str = "a file") -> Path:
    """`expand`, for a file that is going to be written. ValueError where there can be none."""
    path = expand(path, what)
    if path.is_dir():
        raise ValueError(f"{what} {path} is a folder: name a file")
    if path.exists() and not path.is_file():
        raise ValueError(f"{what} {path} is no plain file: name another")
    return _in_a_folder(path, what)


def folder_to_write(path: str | Path, what: str = "a folder") -> Path:
    """`expand`, for a folder that is going to be written into. ValueError where there can be none."""
    path = expand(path, what)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{what} {path} is a file: name a folder")
    return _in_a_folder(path, what)


def _in_a_folder(path: Path, what: str) -> Path:
    above = next((p for p in path.parents if os.path.lexists(p)), Path("."))
    if not above.is_dir():
        raise ValueError(f"{what} {path}: {above} is no folder")
    return path


def did_you_mean(path: str | Path) -> str:
    """For the end of a message on a missing path: the nearest name in its folder, or nothing."""
    path = Path(path)
    missing = next((p for p in reversed((path, *path.parents)) if not os.path.lexists(p)), path)
    try:
        names = [entry.name for entry in missing.parent.iterdir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(missing.name, names, n=1, cutoff=0.75)
    return f"; did you mean {missing.parent / near[0]}?" if near else ""


def cache_folder() -> Path:
    """The folder for derived data: NESTLING_CACHE, else `user_cache`."""
    given = os.environ.get("NESTLING_CACHE")
    return expand(given, "NESTLING_CACHE") if given else user_cache()


def user_cache() -> Path:
    """`nestling` in the user's cache folder; without a home, or one that can be written, a folder of the user's own
    among the temporary files.

    Raises:
        OSError: none of them can be written.
    """
    usual = _usual()
    if usual is not None and _writable(usual):
        return usual
    folder = Path(tempfile.gettempdir()) / f"nestling-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"
    folder.mkdir(mode=0o700, exist_ok=True)
    _own(folder)
    return folder


def _usual() -> Path | None:
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        home = Path.home()
    except RuntimeError:  # neither HOME nor an entry among the users
        return Path(base) / "nestling" if base else None
    return Path(base or home / ("Library/Caches" if sys.platform == "darwin" else ".cache")) / "nestling"


def _writable(folder: Path) -> bool:
    there = next(p for p in (folder, *folder.parents) if p.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _own(folder: Path) -> None:
    """Raise unless the folder is this user's alone: a library is loaded from it."""
    found = folder.lstat()
    other = hasattr(os, "getuid") and found.st_uid != os.getuid()
    if other or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o022:
        raise PermissionError(f"{folder} belongs to someone else: set NESTLING_CACHE to a folder of your own")
