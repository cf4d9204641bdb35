"""A model that learns nothing: before what it predicts stands what it read last, or what a search finds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from experiments.shared.retrieval import Index
from experiments.streams.remedies import TOKEN_BYTES, nats

QUERY = 64  # latest tokens by which passages are found


class Prompted:
    """Predicts B streams a piece at a time, after a start token, passages that BM25 finds, and the latest tokens.

    Options: piece (tokens predicted at once), latest (tokens that stand before them), passages (how many are found,
    0 for a long context: then what was read last stands before a question, too), size (tokens of a passage).
    """

    learns = True

    def __init__(
        self, model: nn.Module, options: dict[str, int], decode: Callable[[list[int]], str], start: int
    ) -> None:
        self.model, self.options, self.decode, self.start = model, options, decode, start
        self.row: Tensor | None = None  # all that was read [B, n]
        self.indices: list[Index] = []  # of each stream

    @torch.no_grad()
    def read(self, row: Tensor) -> Tensor:
        """The loss of each token in nats [B, n] of row [B, n + 1], whose first token comes before them."""
        before = row[:, :1] if self.row is None else self.row
        self.row = torch.cat([before, row[:, 1:]], 1)
        return self._losses(self.row, before.shape[1], self._index)

    def end_part(self) -> None:
        """A text has ended: it is in the index but for its latest tokens, which come as the next is read."""

    @torch.no_grad()
    def known(self, rows: Tensor) -> Tensor:
        """Nats [B, n] of rows, with what was read to look into."""
        before = torch.full_like(rows[:, :1], self.start)
        if self.row is not None and not self.options["passages"]:
            before = torch.cat([self.row, before], 1)
        elif self.row is not None:
            self._index(self.row.shape[1])
        return self._losses(torch.cat([before, rows], 1), before.shape[1])

    def _losses(self, text: Tensor, at: int, index: Callable[[int], None] | None = None) -> Tensor:
        """Nats of the tokens of a text [B, n] from `at` on; `index` takes up what comes before the latest tokens."""
        losses, latest = [], self.options["latest"]
        for begin in range(at, text.shape[1], self.options["piece"]):
            end, near = min(begin + self.options["piece"], text.shape[1]), max(0, begin - latest)
            if index is not None:
                index(near)
            parts = [torch.full_like(text[:, :1], self.start), *self._found(text[:, near:begin]), text[:, near:end]]
            logits = self.model(torch.cat(parts, 1)[:, :-1], use_cache=False).logits[:, begin - end :]
            losses.append(nats(logits, text[:, begin:end]))
        return torch.cat(losses, 1)

    def _index(self, until: int) -> None:
        """Take up what was read before a place."""
        if not (size := self.options["passages"] and self.options["size"]) or self.row is None:
            return
        self.indices = self.indices or [Index() for _ in self.row]
        for index, read in zip(self.indices, self.row.tolist()):
            for n in range(len(index.sizes), until // size):
                index.add(self.decode(read[n * size : (n + 1) * size]))

    def _found(self, latest: Tensor) -> list[Tensor]:
        """Passages of what was read, for the latest tokens [B, n]: [B, size] each."""
        count = min(self.options["passages"], len(self.indices[0].sizes) if self.indices else 0)
        if self.row is None or not count or latest.shape[1] < QUERY:
            return []
        size, found = self.options["size"], []
        for index, ids, row in zip(self.indices, latest[:, -QUERY:].tolist(), self.row):
            numbers = index.best(self.decode(ids), count)
            found.append(torch.cat([row[n * size : (n + 1) * size] for n in numbers]))
        return [torch.stack(found)]

    @property
    def nbytes(self) -> int:
        """Of the text that is kept."""
        if self.row is None:
            return 0
        kept = self.row.shape[1] if self.options["passages"] else min(self.options["latest"], self.row.shape[1])
        return kept * len(self.row) * TOKEN_BYTES
