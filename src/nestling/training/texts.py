"""Files that are text: found by name, told from other files, read without a byte order mark."""

from __future__ import annotations

import codecs
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from nestling.utils.places import did_you_mean, expand

BLOCK = 1 << 20
# UTF-32 first: its mark for little-endian text begins with that of UTF-16
FOREIGN = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip


def find_files(name: str, pattern: str, option: str) -> list[tuple[str, Path]]:
    """(name, path) of the file, or of every file in the folder, that a user's argument means.

    Args:
        pattern: which files of a folder, as a glob; hidden ones never.  option: what sets the pattern.

    Raises:
        ValueError: nothing there, nothing in the folder, no permission, or something that is no file.
    """
    path = expand(name, "TEXT")
    if path.is_file():
        return [(path.name, path)]
    if path.is_dir():
        if not os.access(path, os.R_OK | os.X_OK):
            raise ValueError(f"the folder {path} may not be read by this user")
        try:
            found = sorted(p for p in path.glob(pattern) if not p.is_dir() and not _hidden(p.relative_to(path)))
        except (ValueError, NotImplementedError, IndexError) as error:
            raise ValueError(f"{option} {pattern!r} is no pattern for files of a folder: {error}") from None
        for file in found:
            if file.is_symlink() and not file.exists():
                raise ValueError(f"{file} points at {os.readlink(file)!r}, where nothing is: mend or remove the link")
        files = [(str(p.relative_to(path)), p) for p in found if p.is_file()]
        if not files:
            raise ValueError(f"no file in {path} matches {pattern!r}: choose others with {option}")
        return files
    if path.is_symlink():
        raise ValueError(f"{name!r} points at {os.readlink(path)!r}, where nothing is")
    if path.exists():
        raise ValueError(f"{name!r} is neither a file nor a folder: to read a pipe, give - to nestling learn")
    raise ValueError(f"no file or folder {name!r}{did_you_mean(path)}")


def scan(path: Path, opened: Callable[[Path], BinaryIO] | None = None) -> tuple[int, str]:
    """(bytes, digest) of a file that is UTF-8 text without NUL; a byte order mark does not count.

    Args:
        opened: gives the text of a file; None: `open_text`.

    Raises:
        ValueError: it is no text, or cannot be read.
    """
    digest, size, decoder = hashlib.blake2b(digest_size=8), 0, codecs.getincrementaldecoder("utf-8")()
    with (opened or open_text)(path) as file:
        while block := file.read(BLOCK):
            check_text(block, decoder, size, str(path))
            digest.update(block)
            size += len(block)
        check_text(b"", decoder, size, str(path), final=True)
    return size, digest.hexdigest()


def open_text(path: Path) -> BinaryIO:
    """A file at the beginning of its text, after a byte order mark. ValueError if it cannot be opened."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
        file.seek(0)
    return file


def check_text(block: bytes, decoder: codecs.IncrementalDecoder, offset: int, name: str, final: bool = False) -> None:
    """Raise ValueError unless the next bytes are text: UTF-8 without NUL."""
    at = block.find(b"\0")
    held = len(decoder.getstate()[0])
    try:
        decoder.decode(block, final)
    except UnicodeDecodeError as error:
        wrong = error.start - held
        at = wrong if at < 0 else min(at, wrong)
        raise ValueError(_no_text(name, block, offset, at, error.object[error.start])) from None
    if at >= 0:
        raise ValueError(_no_text(name, block, offset, at, 0))


def _no_text(name: str, block: bytes, offset: int, at: int, byte: int) -> str:
    foreign = next((kind for mark, kind in FOREIGN.items() if not offset and block.startswith(mark)), None)
    if foreign:
        return f"{name} is {foreign}: convert it to UTF-8 (iconv -f {foreign} -t UTF-8) or leave it out"
    return (
        f"{name} is no text: byte {byte:#04x} at offset {offset + at:,} is not UTF-8; convert it to UTF-8 or leave it "
        "out"
    )


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def check_file(path: Path) -> None:
    """Raise ValueError unless a file begins as text does; what follows is checked where it is read."""
    with open_text(path) as file:
        check_text(file.read(BLOCK), codecs.getincrementaldecoder("utf-8")(), 0, str(path))


def lines_from(path: Path, start: int, stop: int, whole_words: bool = False) -> Iterator[bytes]:
    """The lines of a file that begin in bytes start..stop; pieces that meet have every line once.

    whole_words: only lines that do not begin with white space begin a piece, so that no pre-tokenizer joins over a cut.
    """
    with path.open("rb") as file:
        file.seek(start)
        if start == 0:
            if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
                file.seek(0)
        else:
            file.seek(start - 1)
            file.readline()
        begun = start == 0
        while True:
            at = file.tell()
            line = file.readline()
            begins = at == 0 or not whole_words or not line[:1].isspace()
            if not line or (at >= stop and begins):
                return
            begun = begun or begins
            if begun:
                yield line


def pieces_of(text: str, size: int) -> Iterator[str]:
    """A text in pieces of about `size` characters that end with a line, where pre-tokenizers split anyway."""
    start = 0
    while start < len(text):
        end = start + size
        while end < len(text) and not (text[end - 1] == "\n" and not text[end].isspace()):
            end = text.find("\n", end) + 1 or len(text)
        yield text[start:end]
        start = end
