"""Finds the experiments, which stand beside the library in a checkout and are not installed with it."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType


def laboratory(module: str, folder: Path | None = None) -> ModuleType:
    """Import `experiments.MODULE` from a folder: the given one, else the checkout that this library belongs to.

    Processes that the experiment starts find it too: its parent is put on PYTHONPATH.

    Raises:
        ValueError: there is no such folder; the message says how to get it.
    """
    root = find_experiments(folder).parent
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
        os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (str(root), os.environ.get("PYTHONPATH")) if p)
    return importlib.import_module(f"experiments.{module}")


def find_experiments(folder: Path | None = None) -> Path:
    """The folder `experiments`: the given one, that of the library's checkout, or the one here.

    Raises:
        ValueError: none of them holds the experiments.
    """
    places = [Path.cwd() / "experiments", *(parent / "experiments" for parent in Path(__file__).resolve().parents[3:4])]
    for place in places if folder is None else [Path(folder).resolve()]:
        if (place / "shared" / "run.py").is_file() and place.name == "experiments":
            return place
    given = f"{folder} does not hold them" if folder else "they are not installed with the package"
    raise ValueError(
        f"the experiments are part of nestling's repository, and {given}: clone the repository, then run this there or "
        "name its folder with --experiments REPOSITORY/experiments"
    )
