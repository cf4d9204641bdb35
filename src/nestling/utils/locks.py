"""One writer at a time: who reads, changes and writes a file or folder holds its lock from before the reading on."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

WITHOUT = "NESTLING_LOCKS"  # "0": go on without, e.g. on a file system that has none


@contextmanager
def sole_writer(path: str | Path, wait: bool = False) -> Iterator[None]:
    """Inside, nobody else who asks for the same path is inside, in this process or another.

    The lock is a file beside `path`, gone afterwards. The system lets go of it when its process dies, however it dies.

    Args:
        path: a file or folder, there or not yet; a link means what it points at.
        wait: for the other to come to its end, instead of refusing.

    Raises:
        ValueError: another is at it.
        OSError: nothing can be written there, or the file system has no locks; with the remedy.
    """
    path = Path(os.path.realpath(path))
    if os.environ.get(WITHOUT) == "0":
        yield
        return
    made = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    # never a marker file instead of a lock: it would outlive a kill
    lock = FileLock(path.with_name(path.name + ".lock"), fallback_to_soft=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise ValueError(
            f"{path} is being written by another session or run: wait for it, or name another place"
        ) from None
    except OSError as error:
        raise _explained(error, path) from error
    try:
        yield
    finally:
        with suppress(OSError):
            os.unlink(lock.lock_file)  # while it is held: who has it open already sees that it is gone
        lock.release()
        for folder in made:
            with suppress(OSError):
                folder.rmdir()  # made for the lock, and still empty: the work was refused


def _explained(error: OSError, path: Path) -> OSError:
    if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
        return OSError(
            f"{path} lies on a file system without locks ({error.strerror}): keep it on a local disk, or set "
            f"{WITHOUT}=0 if nothing else writes there"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OSError(f"{path.parent} cannot be written ({error.strerror}): name another place")
    return error
