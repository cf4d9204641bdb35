"""The text of an experiment: files to train on, their tails to choose by, and one file held out whole."""

from __future__ import annotations

import functools
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from experiments.shared.data import find_data
from nestling.training.config import DataConfig, unknown
from nestling.training.data import Corpus, Tokens, load_corpus

BOOKS = "a folder of .txt files, for example long public-domain books from standardebooks.org, one file each"
# a few hundred kB that every machine has: enough for a smoke run
_SOURCES = ("argparse.py", "inspect.py", "pickle.py", "tarfile.py", "typing.py")


@dataclass(frozen=True)
class Texts:
    """The corpus to train on (its `val` are the tails), the held-out file, and a fingerprint of both."""

    corpus: Corpus
    test: Tokens
    fingerprint: str


def find_files(folder: str | Path | None, smoke: bool = False) -> list[Path]:
    """The text files of an experiment: those of `folder`, else of `books` in the folder that NESTLING_DATA names.

    A smoke run without a folder reads a few sources of the Python standard library.

    Raises:
        ValueError: no folder is known, or it holds fewer than two text files.
    """
    if folder is None and smoke:
        return [Path(sysconfig.get_paths()["stdlib"]) / name for name in _SOURCES]
    folder = find_data(folder, "books", [], BOOKS)
    files = sorted(folder.glob("*.txt"))
    if len(files) < 2:
        raise ValueError(f"{folder} holds {len(files)} .txt files; at least two are needed, one of them to hold out")
    return files


def load_texts(files: list[Path], test_text: str, data: DataConfig) -> Texts:
    """Tokenise the files once (cached); `test_text` is held out whole, "" means the last file."""
    names = [f.name for f in files]
    if test_text and test_text not in names:
        raise ValueError(unknown("test_text", test_text, names) + "; choose one with -o test_text=NAME")
    held_out = files[names.index(test_text)] if test_text else files[-1]
    return _load(tuple(str(f) for f in files if f != held_out), str(held_out), data.seq_len, data.val_fraction)


@functools.lru_cache(maxsize=4)
def _load(train: tuple[str, ...], test: str, seq_len: int, val_fraction: float) -> Texts:
    corpus = load_corpus(DataConfig(text=[*train], tokenizer="bytes", seq_len=seq_len, val_fraction=val_fraction))
    book = load_corpus(DataConfig(text=[test], tokenizer="bytes", seq_len=seq_len, val_fraction=0))
    return Texts(corpus, book.train, f"{corpus.fingerprint}+{book.fingerprint}")
