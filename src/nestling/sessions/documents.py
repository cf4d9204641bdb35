"""Texts as streams of tokens: files, folders and a pipe, read piece by piece, never whole."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from nestling.sessions.readers import IGNORE, not_ignored, open_document
from nestling.training.texts import check_text, find_files, scan
from nestling.training.tokenizers import encode, is_bytes
from nestling.utils.places import expand

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PIPE = "-"
PIECE = 1 << 14  # bytes tokenised at once
PIPE_PIECE = 1 << 10  # of a pipe: it is learned from no sooner than so much has come

Opener = Callable[[Path], BinaryIO]  # a file at the beginning of what is read of it
Read = Callable[[int], bytes]  # at most so many bytes, b"" at the end


@dataclass(frozen=True)
class Text:
    """One document: a file of known content, or the pipe (no path, size or digest). `opened` gives what is read.

    again: of one that was read before, the name under which snapshots keep what is known after it. It is out of sight.
    """

    name: str
    path: Path | None = None
    size: int | None = None
    digest: str | None = None
    opened: Opener = open_document
    again: str = ""


def find_texts(names: list[str], pattern: str = "**/*", opened: Opener = open_document) -> list[Text]:
    """The documents that files, folders and "-" stand for, in their order; each file is read once to know its content.

    Of a folder, files that its .gitignore or .ignore leaves out are passed over.

    Args:
        pattern: which files of a folder, as a glob.  opened: gives what is read of a file.

    Raises:
        ValueError: a missing file, one that is no text, the pipe named twice, or nothing to read.
    """
    texts: list[Text] = []
    for name in names:
        if name == PIPE:
            texts.append(Text("standard input"))
        else:
            files, folder = find_files(name, pattern, "--pattern"), expand(name, "TEXT")
            chosen = list(not_ignored(folder, files)) if folder.is_dir() else files
            if not chosen:
                raise ValueError(
                    f"every file in {folder} that matches {pattern!r} is left out by {' or '.join(IGNORE)}"
                )
            texts += [Text(found, path, *scan(path, opened), opened) for found, path in chosen]
    if sum(text.path is None for text in texts) > 1:
        raise ValueError("- is named twice: standard input can be read once")
    texts = [text for text in texts if text.size != 0]
    if not texts:
        raise ValueError(f"nothing to read: {', '.join(names) or 'no TEXT was given'} holds no bytes")
    return texts


def pieces(read: Read, offset: int, name: str, size: int = PIECE) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of the pieces from an offset on, of at most `size` bytes, each cut between two words.

    A cut depends on the bytes after the last one only, so reading from any piece's offset gives the same pieces again.
    """
    held, ended, decoder = b"", False, codecs.getincrementaldecoder("utf-8")()
    while True:
        while len(held) < size and not ended:
            more = read(size - len(held))
            ended = not more
            check_text(more, decoder, offset + len(held), name, final=ended)
            held += more
        if not held:
            return
        cut = len(held) if len(held) < size else _cut(held)
        yield offset, held[:cut]
        offset, held = offset + cut, held[cut:]


def _cut(held: bytes) -> int:
    """Before the last single space (or else line end) between two words: tokenizers split words there anyway."""
    for mark in (b" ", b"\n"):
        at = len(held) - 1
        while (at := held.rfind(mark, len(held) // 2, at)) > 0:
            if not (held[at - 1 : at].isspace() or held[at + 1 : at + 2].isspace()):
                return at
    at = len(held) - 1
    while at > len(held) - 4 and held[at] & 0xC0 == 0x80:  # not inside a character
        at -= 1
    return at


class TokenReader:
    """A document's tokens, from `offset` (where a piece begins) and `skip` tokens after it on."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, read: Read, name: str, offset: int = 0, skip: int = 0,
        piece: int = PIECE,
    ) -> None:  # fmt: skip
        self._tokenizer, self._bytes = tokenizer, is_bytes(tokenizer)
        self._pieces = pieces(read, offset, name, piece)
        self._held: deque[tuple[int, list[int], int]] = deque()  # offset, ids, bytes of the pieces ahead
        self._at = 0  # in the first of them
        self._behind = offset
        self.take(skip)

    @property
    def place(self) -> tuple[int, int]:
        """(offset, skip) of the next token."""
        return (self._held[0][0], self._at) if self._held else (self._behind, 0)

    def ahead(self, count: int) -> list[int]:
        """The next `count` tokens (fewer at the end), which stay to be taken."""
        while sum(len(ids) for _, ids, _ in self._held) - self._at < count and self._more():
            pass
        found: list[int] = []
        for _, ids, _ in self._held:
            start = 0 if found or ids is not self._held[0][1] else self._at
            found += ids[start : start + count - len(found)]
            if len(found) == count:
                break
        return found

    def take(self, count: int) -> list[int]:
        """The next `count` tokens (fewer at the end)."""
        found = self.ahead(count)
        self._at += len(found)
        while self._held and self._at >= len(self._held[0][1]):
            offset, ids, size = self._held.popleft()
            self._at -= len(ids)
            self._behind = offset + size
        return found

    def _more(self) -> bool:
        for offset, piece in self._pieces:
            ids = list(piece) if self._bytes else encode(self._tokenizer, piece.decode("utf-8"))
            if ids:
                self._held.append((offset, ids, len(piece)))
                return True
        return False
