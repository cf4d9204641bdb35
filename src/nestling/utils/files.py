"""Files that are either whole or absent: written aside, flushed to the disk, then renamed."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Fill a temporary folder beside `path`; when the block ends well it becomes `path`, else nothing is left.

    A folder that stands at `path` by then (another process was faster) is kept.
    Raises OSError with the path and, for a full disk, the remedy.
    """
    path = Path(path)
    aside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        aside.chmod(0o777 & ~_umask())
        yield aside
        for file in aside.rglob("*"):
            _flush(file)
        _flush(aside)
        if not path.exists():
            os.replace(aside, path)
        _flush(path.parent)
    except OSError as error:
        raise _explained(error, path) from error
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Replace a text file in one step; names that are no text (bytes in a file's name) are written escaped."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: str | Path, content: bytes) -> None:
    """Replace a file in one step; on an error the old file is untouched."""
    with new_file(path) as aside:
        aside.write_bytes(content)


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Fill a temporary file beside `path`; when the block ends well it replaces `path` in one step, else nothing is.

    It has the ending of `path`. A link stays: what it points at is replaced.
    Raises OSError with the path and, for a full disk, the remedy.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:200]}.", suffix=f".tmp{path.suffix[:20]}", dir=path.parent)
    os.close(handle)
    aside = Path(name)
    try:
        yield aside
        _flush(aside)
        aside.chmod(0o644 & ~_umask())
        os.replace(aside, path)
        _flush(path.parent)
    except OSError as error:
        raise _explained(error, path) from error
    finally:
        aside.unlink(missing_ok=True)


def link(path: str | Path, target: str) -> None:
    """Point the symbolic link `path` at `target` in one step."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    aside.unlink(missing_ok=True)
    os.symlink(target, aside)
    os.replace(aside, path)


def _flush(path: Path) -> None:
    """Ask the system to put a file or a folder's entries on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some file systems cannot sync a folder
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.EACCES):
            raise
    finally:
        os.close(handle)


def _explained(error: OSError, path: Path) -> OSError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OSError(
            error.errno,
            f"the disk is full: {path} was not written and what was there before is untouched; free some space "
            "and try again",
        )
    return error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
