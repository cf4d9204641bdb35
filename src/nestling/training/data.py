"""Token files: text, tokenised once, as a memory-mapped array on disk, cached by content and tokenizer."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nestling.training import tokenizers
from nestling.training.config import DataConfig
from nestling.training.prepare import dtype_of, is_prepared, read_manifest
from nestling.training.sources import Document, content_hash, split_documents
from nestling.training.streaming import Stream, make_stream
from nestling.training.texts import pieces_of
from nestling.utils.files import new_folder, write_text
from nestling.utils.locks import sole_writer
from nestling.utils.places import cache_folder, expand

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = 1
PIECE = 1 << 20  # bytes of text encoded at once


@dataclass(frozen=True)
class Tokens:
    """A token stream: `ids` [N] (uint16 or uint32, memory-mapped) and the bytes of text it stands for."""

    ids: np.ndarray
    num_bytes: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def bytes_per_token(self) -> float:
        """Average bytes of text per token, by which bits per byte are counted."""
        return self.num_bytes / max(1, len(self.ids))


@dataclass(frozen=True)
class Mixture:
    """Token streams and the share of the windows that each is read in; the shares sum to 1."""

    sources: tuple[Tokens, ...]
    shares: tuple[float, ...]

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    @property
    def bytes_per_token(self) -> float:
        """Average bytes of text per token, of what is read."""
        return sum(share * tokens.bytes_per_token for share, tokens in zip(self.shares, self.sources))


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on, tokens held out, their tokenizer, and a fingerprint of all three."""

    train: Tokens | Mixture | Stream
    val: Tokens | Mixture
    tokenizer: PreTrainedTokenizerFast
    fingerprint: str
    folder: Path | None = None  # of its token files; None: it has none


def load_corpus(config: DataConfig, tokenizer: PreTrainedTokenizerFast | None = None) -> Corpus:
    """Tokenise the text of a configuration, or find it in the cache.

    Args:
        config: what to read; see `DataConfig`.
        tokenizer: used instead of `config.tokenizer` (a model brings its own).

    Raises:
        ValueError: no text, an empty or too short one, a file that is not UTF-8 under a tokenizer other than bytes.
    """
    if config.stream:
        return _streamed(config, tokenizer)
    if config.shares:
        return _mixed(config, tokenizer)
    if any(map(is_prepared, config.text)):
        return _load_prepared(config, tokenizer)
    split = split_documents(config)
    digest = hashlib.sha256(f"{FORMAT}".encode())
    for part in (split.train, split.val):
        digest.update(b"|part|" + b"".join(content_hash(part)))
    text_key = digest.hexdigest()[:16]
    root = expand(config.cache_dir, "data.cache_dir") if config.cache_dir else cache_folder()
    if tokenizer is None:
        tokenizer = _tokenizer(config.tokenizer, split.train, root, text_key)
    key = f"{text_key}-{tokenizers.fingerprint(tokenizer)}"
    folder = root / "tokens" / key
    if not _is_whole(folder):
        with sole_writer(folder, wait=True):
            if not _is_whole(folder):  # still: another process may just have made it
                shutil.rmtree(folder, ignore_errors=True)
                _build(folder, split.train, split.val, tokenizer, key)
    return _opened(folder, _manifest(folder), tokenizer, key, config)


def _mixed(config: DataConfig, tokenizer: PreTrainedTokenizerFast | None) -> Corpus:
    """Every text as a stream of its own, cached as such, with one tokenizer."""
    if tokenizer is None and config.tokenizer.startswith("bpe"):  # trained on all of them
        tokenizer = load_corpus(replace(config, shares=[])).tokenizer
    parts: list[Corpus] = []
    for text in config.text:
        try:
            parts.append(load_corpus(replace(config, text=[text], shares=[]), tokenizer))
        except ValueError as error:
            raise ValueError(f"{text}: {error}") from error
        tokenizer = parts[0].tokenizer
    shares = tuple(share / sum(config.shares) for share in config.shares)
    key = hashlib.sha256(json.dumps([[part.fingerprint for part in parts], shares]).encode()).hexdigest()[:16]
    train, val = (Mixture(tuple(getattr(part, name) for part in parts), shares) for name in ("train", "val"))
    return Corpus(train, parts[0].val if config.val_text else val, parts[0].tokenizer, key, parts[0].folder)


def _streamed(config: DataConfig, tokenizer: PreTrainedTokenizerFast | None) -> Corpus:
    """A stream, and what is held out of it: other text, or its beginning."""
    if tokenizer is None:
        own = config.tokenizer in ("bytes", "auto")
        tokenizer = tokenizers.byte_tokenizer() if own else tokenizers.load_tokenizer(config.tokenizer)
    stream, head, key = make_stream(config, tokenizer)
    val = Tokens(head.ids if config.val_windows else head.ids[:0], head.num_bytes)
    if config.val_text:
        plain = replace(config, stream=False, text=config.val_text, val_text=[], val_fraction=0.0)
        other = load_corpus(plain, tokenizer)
        val, key = other.train, f"{key}-{other.fingerprint}"
    return Corpus(stream, val, tokenizer, key)


def _load_prepared(config: DataConfig, tokenizer: PreTrainedTokenizerFast | None) -> Corpus:
    """The tokens of a folder that `nestling data` has made."""
    if len(config.text) > 1 or config.val_text:
        raise ValueError(
            f"a folder of nestling data is read alone and brings its held-out text: {', '.join(config.text)} "
            f"{'and val_text ' if config.val_text else ''}cannot be mixed here; say the share of "
            "each (--share), or prepare the texts together (--weight)"
        )
    folder = expand(config.text[0], "TEXT")
    manifest, own = read_manifest(folder), tokenizers.load_tokenizer(folder / "tokenizer")
    if tokenizer is None and config.tokenizer != "auto":
        tokenizer = tokenizers.byte_tokenizer() if config.tokenizer == "bytes" else _named(config.tokenizer)
    if tokenizer is not None and tokenizers.fingerprint(tokenizer) != tokenizers.fingerprint(own):
        raise ValueError(f"{folder} was made with another tokenizer than the model's: prepare it with that one")
    return _opened(folder, manifest, tokenizer or own, manifest["key"], config)


def _named(name: str) -> PreTrainedTokenizerFast:
    if name.startswith("bpe"):
        raise ValueError("a folder of nestling data has its tokenizer: leave tokenizer out")
    return tokenizers.load_tokenizer(name)


def _opened(folder: Path, manifest: dict, tokenizer: PreTrainedTokenizerFast, key: str, config: DataConfig) -> Corpus:
    """A folder's memory maps."""
    parts = {}
    for name in ("train", "val"):
        entry = manifest[name]
        ids = np.empty(0, dtype=manifest["dtype"])
        if entry["tokens"]:
            ids = np.memmap(folder / f"{name}.bin", dtype=manifest["dtype"], mode="r", shape=(entry["tokens"],))
        parts[name] = Tokens(ids, entry["bytes"])
    if len(parts["train"]) < config.seq_len + 1:
        raise ValueError(
            f"the text is too short: {len(parts['train'])} training tokens, but one window of seq_len "
            f"{config.seq_len} needs "
            f"{config.seq_len + 1}; give more text or a smaller seq_len"
        )
    return Corpus(parts["train"], parts["val"], tokenizer, key, folder)


def _tokenizer(name: str, documents: list[Document], root: Path, text_key: str) -> PreTrainedTokenizerFast:
    if name in ("bytes", "auto"):
        return tokenizers.byte_tokenizer()
    if name.startswith("bpe"):
        size = name.removeprefix("bpe").removeprefix(":")
        if not size.isdigit():
            raise ValueError(f"tokenizer {name!r} must name its size, e.g. 'bpe:4096'")
        folder = root / "tokenizers" / f"{text_key}-bpe-{size}"
        if not (folder / "tokenizer.json").is_file():
            with sole_writer(folder, wait=True):
                if not folder.exists():
                    texts = (piece for document in documents for piece in _pieces(document))
                    trained = tokenizers.train_bpe(texts, int(size))
                    with new_folder(folder) as aside:
                        trained.save_pretrained(aside)
        return tokenizers.load_tokenizer(folder)
    return tokenizers.load_tokenizer(name)


def _build(
    folder: Path, train: list[Document], val: list[Document], tokenizer: PreTrainedTokenizerFast, key: str
) -> None:
    dtype = dtype_of(tokenizer)
    manifest = {"format": FORMAT, "key": key, "dtype": dtype.str}
    with new_folder(folder) as aside:
        for name, documents in (("train", train), ("val", val)):
            tokens = total = 0
            with open(aside / f"{name}.bin", "wb") as file:
                for document in documents:
                    for ids, length in _encoded(document, tokenizer, dtype):
                        ids.tofile(file)
                        tokens, total = tokens + len(ids), total + length
            manifest[name] = {"tokens": tokens, "bytes": total, "documents": [d.name for d in documents][:1000]}
        write_text(aside / "manifest.json", json.dumps(manifest, indent=1))


def _encoded(
    document: Document, tokenizer: PreTrainedTokenizerFast, dtype: np.dtype
) -> Iterator[tuple[np.ndarray, int]]:
    """A document's ids piece by piece, each with its length in bytes; the end-of-text token closes it."""
    if tokenizers.is_bytes(tokenizer):
        text = document.read()
        yield np.frombuffer(text, dtype=np.uint8).astype(dtype), len(text)
    else:
        for piece in _pieces(document):
            yield np.array(tokenizers.encode(tokenizer, piece), dtype=dtype), len(piece.encode())
    yield np.array([tokenizer.eos_token_id], dtype=dtype), 0


def _pieces(document: Document) -> Iterator[str]:
    """A document's text in pieces that end with a line, where pre-tokenizers split anyway."""
    raw = document.read()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{document.name} is not UTF-8 text (byte {error.start}); convert it, leave it out, or use the "
            "'bytes' tokenizer, which takes anything"
        ) from error
    yield from pieces_of(text, PIECE)


def _manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def _is_whole(folder: Path) -> bool:
    """Whether a cached token file can be used: it is derived data, so a damaged one is simply built again."""
    try:
        manifest = _manifest(folder)
        width = np.dtype(manifest["dtype"]).itemsize
        sizes = [
            (folder / f"{name}.bin").stat().st_size == manifest[name]["tokens"] * width for name in ("train", "val")
        ]
        return manifest["format"] == FORMAT and manifest["key"] == folder.name and all(sizes)
    except (OSError, ValueError, KeyError, TypeError):
        return False
