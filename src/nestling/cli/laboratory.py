"""Finds the experiments, which stand beside the library in a checkout and are not installed with it."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

MARK = 'LABORATORY = "nestling"'  # a line of experiments/__init__.py: other projects have folders of that name


def laboratory(module: str, folder: Path | None = None) -> ModuleType:
    """Import `experiments.MODULE` from a folder: the given one, else the checkout's (see `find_experiments`).

    The folder's parent goes to the front of the search path, before a package of the same name elsewhere, and of
    PYTHONPATH, for processes that the experiment starts.

    Raises:
        ValueError: there is none (the message says how to get it), or another package of that name is imported
            already.
    """
    root = str(find_experiments(folder).parent)
    if sys.path[0] != root:
        sys.path.insert(0, root)
    others = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p != root]
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *others])
    package = importlib.import_module("experiments")
    if Path(root, "experiments") not in [Path(p).resolve() for p in package.__path__]:
        raise ValueError(f"another package `experiments` is imported already, from {list(package.__path__)}")
    return importlib.import_module(f"experiments.{module}")


def find_experiments(folder: Path | None = None) -> Path:
    """The folder `experiments`: the given one, else that of the library's checkout, else the one here or above here.

    Raises:
        ValueError: none of them holds nestling's experiments.
    """
    here = Path.cwd()
    checkouts = [Path(__file__).resolve().parents[3], here, *here.parents]
    for place in [c / "experiments" for c in checkouts] if folder is None else [Path(folder).expanduser().resolve()]:
        if place.name == "experiments" and _marked(place):
            return place.resolve()
    given = f"{folder} does not hold them" if folder else "they are not installed with the package"
    raise ValueError(
        f"the experiments are part of nestling's repository, and {given}: clone the repository, then run this there or "
        "name its folder with --experiments REPOSITORY/experiments"
    )


def listing(folder: Path | None = None) -> str:
    """All experiments, a line each under the heading of its group.

    Raises:
        ValueError: they are not here.
    """
    return laboratory("catalog", folder).listing()


def _marked(folder: Path) -> bool:
    """Whether the folder says that it is nestling's; its code is read, not run."""
    try:
        return MARK in (folder / "__init__.py").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
