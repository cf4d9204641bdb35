"""Text that is read as it arrives: a streaming data set, packed into windows and shuffled through a buffer.

Nothing is written to a disk and nothing but the buffer is held. Which windows come is a function of the data set's
order and the seed, so a checkpoint needs the place in the data set and the buffer, and a run goes on with the same
windows, on any number of processes.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nestling.training import tokenizers
from nestling.training.config import DataConfig
from nestling.training.prepare import dtype_of
from nestling.training.texts import find_files, pieces_of
from nestling.utils.ranks import rows_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

KINDS = {".jsonl": "json", ".parquet": "parquet"}  # of local files, as `datasets` calls them
PIECE = 1 << 20  # characters that a tokenizer is given at a time
LEAST = 100_000  # tokens from which bytes per token are counted


@dataclass(frozen=True)
class Stream:
    """Text to train on that is never held.

    Attributes:
        open: gives the data set anew, an `IterableDataset` of the library `datasets`.  column: where its text is.
        begin: its state after what is held out.  buffer: windows among which the next is drawn.
        bytes_per_token: of its first documents.
    """

    open: Callable[[], Any]
    column: str
    begin: dict[str, Any]
    tokenizer: PreTrainedTokenizerFast
    buffer: int
    bytes_per_token: float


@dataclass(frozen=True)
class Head:
    """The first documents of a stream: their ids, the bytes they stand for, and the data set's state after them."""

    ids: np.ndarray
    num_bytes: int
    state: dict[str, Any]


def open_stream(config: DataConfig) -> Callable[[], Any]:
    """What opens the data set that a configuration names, as often as wanted.

    Raises:
        ValueError: no such data set or files, files of other kinds than .jsonl and .parquet, no such column.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            "--stream reads by the library `datasets`, which is not installed: pip install 'nestling[data]'"
        ) from error
    from nestling.training.sources import is_data_set

    if len(config.text) == 1 and is_data_set(config.text[0]):
        how: dict[str, Any] = dict(path=config.text[0], name=config.dataset_config)
    else:
        how = _of_files([path for name in config.text for _, path in find_files(name, config.pattern, "data.pattern")])

    def opened() -> Any:
        return datasets.load_dataset(**how, split="train", streaming=True)

    try:
        first = next(iter(opened()), None)
    except Exception as error:
        said = str(error).splitlines()[0] if str(error) else ""
        raise ValueError(f"{', '.join(config.text)} cannot be streamed ({type(error).__name__}: {said})") from error
    if first is None:
        raise ValueError(f"nothing to read: {', '.join(config.text)} holds no documents")
    if config.column not in first:
        raise ValueError(
            f"{', '.join(config.text)} has no column {config.column!r} (option data.column); it has {', '.join(first)}"
        )
    return opened


def _of_files(paths: list[Path]) -> dict[str, Any]:
    """Arguments of `datasets.load_dataset` for files of one kind."""
    if not paths:
        raise ValueError("no text was given: name .jsonl or .parquet files, their folder, or a data set as owner/name")
    kinds = {path.suffix for path in paths}
    if len(kinds) > 1 or not kinds <= KINDS.keys():
        raise ValueError(
            f"--stream takes a data set of the hub, or files of one kind, .jsonl or .parquet; got "
            f"{', '.join(sorted(kind or 'files without an ending' for kind in kinds))}: leave --stream out, or prepare "
            "them (nestling data)"
        )
    return dict(path=KINDS[kinds.pop()], data_files=[str(path) for path in paths])


def read_head(opened: Callable[[], Any], config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> Head:
    """The first documents: what is held out, and at least so many tokens that bytes per token can be counted."""
    rows, found, num_bytes, size = opened(), [], 0, 0
    wanted = config.val_windows * config.seq_len + 1 if config.val_windows and not config.val_text else 0
    state, held = copy.deepcopy(rows.state_dict()), (0, 0)
    for row in rows:
        text = str(row[config.column] or "")
        pieces = list(_ids(text, tokenizer)) if text else []
        found += pieces
        num_bytes, size = num_bytes + len(text.encode()), size + sum(map(len, pieces))
        if held == (0, 0) and 0 < wanted <= size:
            held, state = (size, num_bytes), copy.deepcopy(rows.state_dict())
        if size >= max(wanted, LEAST):
            break
    if size < wanted:
        raise ValueError(
            f"the stream holds {size:,} tokens, fewer than the {wanted:,} that data.val_windows {config.val_windows} "
            "holds out at its beginning; hold out less, or name other text with --val"
        )
    ids = np.concatenate(found) if found else np.empty(0, dtype_of(tokenizer))
    return Head(ids, num_bytes, state) if not wanted else Head(ids[: held[0]], held[1], state)


def make_stream(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> tuple[Stream, Head, str]:
    """The stream of a configuration, its beginning, and a fingerprint of both and the tokenizer."""
    opened = open_stream(config)
    head = read_head(opened, config, tokenizer)
    if not len(head.ids):
        raise ValueError(f"nothing to read: the documents of {', '.join(config.text)} are empty")
    said = json.dumps([config.text, config.dataset_config, config.column, tokenizers.fingerprint(tokenizer)])
    key = hashlib.sha256(said.encode() + head.ids.tobytes()).hexdigest()[:16]
    ratio = head.num_bytes / len(head.ids)
    return Stream(opened, config.column, head.state, tokenizer, config.shuffle, ratio), head, key


class StreamedBatches:
    """Windows of seq_len + 1 tokens of a stream, read in order and given in the order of a shuffle buffer.

    Documents follow one another, each closed by the end-of-text token, and begin anew when the stream ends. Every
    process reads the whole stream and takes its rows, so that a run goes on at any number of them.

    Args: those of `Batches`, with a `Stream` for tokens.
    """

    def __init__(
        self, stream: Stream, seq_len: int, batch_size: int, seed: int = 0, rank: int = 0, ranks: int = 1
    ) -> None:
        self._rows = rows_of(batch_size, rank, ranks)
        self._stream, self.seq_len, self.batch_size, self.seed = stream, seq_len, batch_size, seed
        self._next = 0
        self._held = np.empty((0, seq_len + 1), dtype_of(stream.tokenizer))
        self._pending: list[np.ndarray] = []
        self._go_to(stream.begin)

    def __getitem__(self, index: int) -> torch.Tensor:
        """This process's rows of batch `index`, which must be the next: [batch_size / ranks, seq_len + 1], int64."""
        if index != self._next:
            raise ValueError(f"a stream is read in order: the next batch is {self._next}, not {index}")
        self._next += 1
        drawn = [self._draw(index * self.batch_size + row) for row in range(self.batch_size)]
        return torch.from_numpy(np.stack([drawn[row] for row in self._rows]).astype(np.int64))

    def state_dict(self) -> dict[str, Any]:
        """All that the next batches depend on: the place in the data set, the text begun, and the buffer."""
        pending = np.concatenate([*self._pending, self._held[:0].reshape(-1)])
        return {
            "next": self._next,
            "documents": copy.deepcopy(self._documents.state_dict() if self._begun else self._place),
            "pending": torch.from_numpy(pending.astype(np.int64)),
            "held": torch.from_numpy(self._held.astype(np.int64)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was called."""
        self._next, kind = state["next"], self._held.dtype
        self._held, self._pending = state["held"].numpy().astype(kind), [state["pending"].numpy().astype(kind)]
        self._go_to(state["documents"])

    def _go_to(self, place: dict[str, Any]) -> None:
        self._documents, self._place = self._stream.open(), place
        self._documents.load_state_dict(copy.deepcopy(place))
        self._texts = iter(self._documents)
        self._begun = False  # before its first document a data set says that it is at its beginning, wherever it is

    def _draw(self, number: int) -> np.ndarray:
        """The window of the given number: one of the buffer, whose place the stream's next one takes."""
        if not len(self._held):
            self._held = np.stack([self._window() for _ in range(self._stream.buffer)])
        place = int(np.random.default_rng([self.seed, number]).integers(len(self._held)))
        window = self._held[place].copy()
        self._held[place] = self._window()
        return window

    def _window(self) -> np.ndarray:
        """The next window in the stream's order; its last token is the next one's first."""
        size, ended_at = sum(map(len, self._pending)), -1
        while size <= self.seq_len:
            row = next(self._texts, None)
            self._begun = True
            if row is None:
                if ended_at == size:
                    raise ValueError("the stream holds no text beyond what is held out: lower data.val_windows")
                ended_at = size
                self._go_to(self._stream.begin)
            elif text := str(row[self._stream.column] or ""):
                self._pending += list(_ids(text, self._stream.tokenizer))
                size = sum(map(len, self._pending))
        whole = self._pending[0] if len(self._pending) == 1 else np.concatenate(self._pending)
        self._pending = [whole[self.seq_len :]]
        return whole[: self.seq_len + 1]


def _ids(text: str, tokenizer: PreTrainedTokenizerFast) -> Iterator[np.ndarray]:
    """A document's ids, the end-of-text token last."""
    kind = dtype_of(tokenizer)
    if tokenizers.is_bytes(tokenizer):
        yield np.frombuffer(text.encode(), dtype=np.uint8).astype(kind)
    else:
        for piece in pieces_of(text, PIECE):
            yield np.array(tokenizers.encode(tokenizer, piece), dtype=kind)
    yield np.array([tokenizer.eos_token_id], dtype=kind)
