"""The demo's text: the Python standard library's own sources, which every machine has, or a file of the user's."""

from __future__ import annotations

import hashlib
import math
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nestling.utils.places import did_you_mean, expand

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data", "ensurepip"}
PROMPTS = ('    def read(self, size=-1):\n        """', "# This module implements ")
SMALLEST = 10_000  # bytes of the user's text


@dataclass(frozen=True)
class Text:
    """What is read: a name for people, files to train on, files held out (none: the tail of each is held out), and
    beginnings for samples (none: lines of the held-out text)."""

    name: str
    train: list[str]
    held_out: list[str]
    prompts: tuple[str, ...] = ()


def standard_library(held_out: float = 0.05) -> Text:
    """The sources of this interpreter's standard library, without tests and tables; whole modules are held out.

    Which modules are held out depends on their names only.

    Raises:
        ValueError: an interpreter without readable sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [p for p in sorted(root.rglob("*.py")) if not SKIPPED.intersection(p.relative_to(root).parts)]
    # tables of character codes are no language
    files = [p for p in files if "encodings" not in p.parts and p.stat().st_size > 0]
    if len(files) < 20:
        raise ValueError(f"this Python has no standard library sources in {root}: give a text of your own with --text")
    chosen = [p for p in files if _place(str(p.relative_to(root))) < held_out]
    rest = [p for p in files if p not in set(chosen)]
    return Text("the Python standard library's sources", [str(p) for p in rest], [str(p) for p in chosen], PROMPTS)


def own_text(path: str | Path) -> Text:
    """A file or folder of the user's; the end of every file is held out.

    Raises:
        ValueError: nothing there, or too little to learn from.
    """
    path = expand(path, "--text")
    if not path.exists():
        raise ValueError(f"--text: no file or folder {str(path)!r}{did_you_mean(path)}")
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    size = sum(p.stat().st_size for p in files)
    if size < SMALLEST:
        raise ValueError(f"--text: {path} has {size:,} bytes, too few to learn from; give at least {SMALLEST:,}")
    return Text(path.name, [str(path)], [])


def byte_entropy(ids: np.ndarray) -> float:
    """Bits per byte of a text if only the frequencies of its bytes were known: what a model must beat."""
    counts = np.bincount(ids[ids < 256], minlength=256)
    p = counts[counts > 0] / max(1, counts.sum())
    return float(-(p * np.log2(p)).sum()) if len(p) else math.nan


def excerpt(ids: np.ndarray, length: int) -> np.ndarray:
    """The `length` bytes of a token stream to look at closely: the beginning of a document, the wordiest one.

    Documents end with an id above 255.
    """
    starts = [0, *(np.flatnonzero(ids[:-1] > 255) + 1)]
    best, best_score = ids[:length], -1.0
    for start in starts:
        piece = ids[start : start + length]
        if len(piece) < length or (piece > 255).any():
            continue
        letters = (piece >= 97) & (piece <= 122)
        score = float((letters | (piece == 32)).mean() - (piece > 127).mean())
        if score > best_score:
            best, best_score = piece, score
    return np.asarray(best[best < 256], dtype=np.int64)


def _place(name: str) -> float:
    """A number in [0, 1) from a name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) / 2**64
