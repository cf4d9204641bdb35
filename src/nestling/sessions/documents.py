"""Texts as streams of tokens: files, folders and a pipe, read piece by piece, never whole."""

from __future__ import annotations

import codecs
import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nestling.training.tokenizers import encode, is_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PIPE = "-"
PIECE = 1 << 14  # bytes tokenised at once
PIPE_PIECE = 1 << 10  # of a pipe: it is learned from no sooner than so much has come
BLOCK = 1 << 20

Read = Callable[[int], bytes]  # at most so many bytes, b"" at the end


@dataclass(frozen=True)
class Text:
    """One document: a file of known content, or the pipe (no path, size or digest)."""

    name: str
    path: Path | None = None
    size: int | None = None
    digest: str | None = None


def find_texts(names: list[str], pattern: str = "**/*") -> list[Text]:
    """The documents that files, folders and "-" stand for, in their order; each file is read once to know its content.

    Raises:
        ValueError: a missing file, one that is no text, the pipe named twice, or nothing to read.
    """
    texts: list[Text] = []
    for name in names:
        path = Path(name).expanduser()
        if name == PIPE:
            texts.append(Text("standard input"))
        elif path.is_dir():
            files = sorted(p for p in path.glob(pattern) if p.is_file() and not _hidden(p.relative_to(path)))
            if not files:
                raise ValueError(f"no file in {path} matches {pattern!r}: choose others with --pattern")
            texts += [_scan(str(file.relative_to(path)), file) for file in files]
        elif path.is_file():
            texts.append(_scan(path.name, path))
        elif path.exists():
            raise ValueError(f"{name!r} is neither a file nor a folder: to read a pipe, give - and pipe into nestling")
        else:
            raise ValueError(f"no file or folder {name!r}: TEXT takes files, folders, or - for standard input")
    if sum(text.path is None for text in texts) > 1:
        raise ValueError("- is named twice: standard input can be read once")
    texts = [text for text in texts if text.size != 0]
    if not texts:
        raise ValueError(f"nothing to read: {', '.join(names) or 'no TEXT was given'} holds no bytes")
    return texts


def _scan(name: str, path: Path) -> Text:
    digest, size, decoder = hashlib.blake2b(digest_size=8), 0, codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            _check(block, decoder, size, str(path))
            digest.update(block)
            size += len(block)
        _check(b"", decoder, size, str(path), final=True)
    return Text(name, path, size, digest.hexdigest())


def _check(block: bytes, decoder: codecs.IncrementalDecoder, offset: int, name: str, final: bool = False) -> None:
    """Raise unless the next bytes are text: UTF-8 without NUL."""
    at = block.find(b"\0")
    held = len(decoder.getstate()[0])
    try:
        decoder.decode(block, final)
    except UnicodeDecodeError as error:
        wrong = error.start - held
        at = wrong if at < 0 else min(at, wrong)
        raise ValueError(_no_text(name, offset + at, error.object[error.start])) from None
    if at >= 0:
        raise ValueError(_no_text(name, offset + at, 0))


def _no_text(name: str, offset: int, byte: int) -> str:
    return f"{name} is no text: byte {byte:#04x} at offset {offset:,} is not UTF-8; convert it to UTF-8 or leave it out"


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def pieces(read: Read, offset: int, name: str, size: int = PIECE) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of the pieces from an offset on, of at most `size` bytes, each cut between two words.

    A cut depends on the bytes after the last one only, so reading from any piece's offset gives the same pieces again.
    """
    held, ended, decoder = b"", False, codecs.getincrementaldecoder("utf-8")()
    while True:
        while len(held) < size and not ended:
            more = read(size - len(held))
            ended = not more
            _check(more, decoder, offset + len(held), name, final=ended)
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
