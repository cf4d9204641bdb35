"""Where an experiment's data are: the folder the user named, else one in the folder that NESTLING_DATA names."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def find_data(folder: str | Path | None, name: str, files: Iterable[str], source: str) -> Path:
    """A data set's folder: `folder`, else `name` in the one that NESTLING_DATA names.

    Args:
        source: where the data come from, for the message.

    Raises:
        ValueError: no folder is known, it does not exist, or a file is missing.
    """
    if folder is None:
        if not (root := os.environ.get("NESTLING_DATA")):
            raise ValueError(
                f"no data: name a folder with --data, or set NESTLING_DATA to a folder that holds `{name}`; {source}"
            )
        folder = Path(root) / name
    folder = Path(folder).expanduser()
    for file in files:
        if not (folder / file).is_file():
            raise ValueError(f"{folder} lacks {file}: {source}")
    if not folder.is_dir():
        raise ValueError(f"no folder {str(folder)!r}: name one with --data; {source}")
    return folder
