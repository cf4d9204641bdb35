"""Where text comes from: files, folders, or a data set of the `datasets` library, as a list of documents in bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nestling.training.config import DataConfig
from nestling.training.texts import find_files, open_text, scan
from nestling.utils.places import did_you_mean


@dataclass(frozen=True)
class Document:
    """One text: its name and its bytes, read when asked for."""

    name: str
    path: Path | None = None
    content: bytes = field(default=b"", repr=False)

    def read(self) -> bytes:
        """The document's bytes."""
        if self.path is None:
            return self.content
        with open_text(self.path) as file:
            return file.read()


@dataclass(frozen=True)
class Split:
    """Documents to train on and documents held out."""

    train: list[Document]
    val: list[Document]


def find_documents(names: list[str], config: DataConfig) -> list[Document]:
    """The documents that files, folders or one data set of the hub, owner/name, stand for.

    Raises:
        ValueError: nothing there, a file that is no text, nothing to read.
    """
    documents, size = [], 0
    for name in names:
        if is_data_set(name):
            rows = _from_datasets(name, config, "train")
            documents, size = documents + rows, size + sum(len(row.content) for row in rows)
            continue
        for found, path in find_files(name, config.pattern, "data.pattern"):
            documents.append(Document(found, path))
            size += scan(path)[0]
    if not size:
        raise ValueError(f"nothing to read: {', '.join(names) or 'no text was given'} holds no bytes")
    return documents


def split_documents(config: DataConfig) -> Split:
    """Training and held-out documents by the rule of `DataConfig`; the parts never overlap."""
    if not config.text:
        raise ValueError("no text was given: name a file, a folder or a `datasets` data set")
    documents = find_documents(config.text, config)
    if config.val_text:
        held_out = find_documents(config.val_text, config)
        shared = {d.path.resolve() for d in documents if d.path} & {d.path.resolve() for d in held_out if d.path}
        return Split([d for d in documents if not d.path or d.path.resolve() not in shared], held_out)
    if config.val_fraction == 0:
        return Split(documents, [])
    if config.val_split == "documents":
        return _by_document(documents, config.val_fraction)
    return _by_tail(documents, config.val_fraction)


def content_hash(documents: list[Document]) -> Iterator[bytes]:
    """Digests that change whenever a document's bytes or the order of documents change."""
    for document in documents:
        yield hashlib.blake2b(document.read(), digest_size=16).digest()


def _by_tail(documents: list[Document], fraction: float) -> Split:
    """The end of every file, and the last rows of a data set."""
    train, val = [], []
    rows = [document for document in documents if document.path is None]
    left = sum(len(row.content) for row in rows) * (1 - fraction)
    for row in rows:
        (train if left > 0 else val).append(row)
        left -= len(row.content)
    for document in (document for document in documents if document.path is not None):
        text = document.read()
        cut = _boundary(text, round(len(text) * (1 - fraction)))
        for part, piece in ((train, text[:cut]), (val, text[cut:])):
            if piece:
                part.append(Document(document.name, content=piece))
    return Split(train, val)


def _by_document(documents: list[Document], fraction: float) -> Split:
    """Whole documents, chosen by a hash of their names (so that more files do not reshuffle the choice)."""
    if len(documents) < 2:
        raise ValueError("val_split='documents' needs at least two documents; use val_split='tail' or name val_text")

    def place(document: Document) -> int:
        return int.from_bytes(hashlib.blake2b(os.fsencode(document.name), digest_size=8).digest())

    held_out = [d for d in documents if place(d) < fraction * 2**64]
    if not held_out or len(held_out) == len(documents):  # few documents: the one with the smallest hash
        held_out = [min(documents, key=place)]
    return Split([d for d in documents if d not in held_out], held_out)


def _boundary(text: bytes, cut: int) -> int:
    """The last line end at most 4,096 bytes before `cut`, else the last whole UTF-8 character."""
    line = text.rfind(b"\n", max(0, cut - 4096), cut)
    if line >= 0:
        return line + 1
    while 0 < cut < len(text) and text[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut


def is_data_set(name: str) -> bool:
    """Whether a name can only be one at the hub, owner/name: nothing here is called so, or nearly so."""
    path = Path(name)
    return (
        len(path.parts) == 2
        and name == path.as_posix()
        and name[0] not in "./~"
        and not _ending(path)
        and not any(os.path.lexists(p) or did_you_mean(p) for p in (path, path.parent))
    )


def _ending(path: Path) -> bool:
    return path.suffix[1:].isalpha() and len(path.suffix) <= 6


def _from_datasets(name: str, config: DataConfig, split: str) -> list[Document]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"no file or folder {name!r}, and the `datasets` library, which could fetch a data set of that "
            "name, is not "
            "installed: pip install 'nestling[data]'"
        ) from error
    try:
        rows = datasets.load_dataset(name, config.dataset_config, split=split)
    except Exception as error:
        raise ValueError(
            f"{name!r} is neither a file nor a folder, and `datasets` cannot load it "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        ) from error
    if config.column not in rows.column_names:
        raise ValueError(
            f"data set {name!r} has no column {config.column!r} (option data.column); it has "
            f"{', '.join(rows.column_names)}"
        )
    return [Document(f"{name}[{i}]", content=str(text).encode()) for i, text in enumerate(rows[config.column]) if text]
