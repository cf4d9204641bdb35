"""Which windows make batch i: a pure function of the seed and i, so that a run resumes anywhere without replay."""

from __future__ import annotations

import functools

import numpy as np
import torch

from nestling.training.data import Mixture, Tokens
from nestling.utils.ranks import rows_of

BLOCK = 1000  # windows in which the shares of a mixture come out


class Batches:
    """Windows of seq_len + 1 tokens in random order, without repetition inside an epoch.

    Epoch e cuts the stream into windows at a random phase and visits them in a random order, both drawn from (seed, e).

    Args:
        tokens: the token stream.
        seq_len: tokens predicted per window.
        batch_size: windows per batch.
        seed: what the order depends on.
        rank, ranks: of so many processes this one reads an equal part of the rows of every batch; together they read
            what one process does.
    """

    def __init__(
        self, tokens: Tokens, seq_len: int, batch_size: int, seed: int = 0, rank: int = 0, ranks: int = 1
    ) -> None:
        self._rows = rows_of(batch_size, rank, ranks)
        if len(tokens) < seq_len + 1:
            raise ValueError(f"{len(tokens)} tokens are too few for one window of seq_len {seq_len} + 1")
        self.tokens, self.seq_len, self.batch_size, self.seed = tokens, seq_len, batch_size, seed
        self._num_windows = max(1, (len(tokens) - 1) // seq_len - 1)  # one less than fits: room for the phase
        self._order = functools.lru_cache(maxsize=2)(self._draw)

    def __getitem__(self, index: int) -> torch.Tensor:
        """This process's rows of batch `index`, [batch_size / ranks, seq_len + 1], int64."""
        starts = [self.start(index * self.batch_size + row) for row in self._rows]
        return windows(self.tokens, starts, self.seq_len)

    def start(self, sequence: int) -> int:
        """Where the window of the given number (counted over all batches) starts in the stream."""
        epoch, place = divmod(sequence, self._num_windows)
        phase, order = self._order(epoch)
        return phase + int(order[place]) * self.seq_len

    def _draw(self, epoch: int) -> tuple[int, np.ndarray]:
        generator = np.random.default_rng([self.seed, epoch])
        last = len(self.tokens) - 1 - self._num_windows * self.seq_len  # the largest phase that fits
        phase = int(generator.integers(0, min(last, self.seq_len - 1) + 1))
        return phase, generator.permutation(self._num_windows)


class MixedBatches:
    """Windows of several streams, each in its share: after any number of windows it is right to within three.

    Of every 1,000 windows a stream has as many as its share says, spread evenly from a random place on; it reads them
    as `Batches` does. Arguments: those of `Batches`.
    """

    def __init__(self, mixture: Mixture, seq_len: int, batch_size: int, seed: int = 0, rank: int = 0, ranks: int = 1):
        self._streams = [Batches(t, seq_len, batch_size, seed + i, rank, ranks) for i, t in enumerate(mixture.sources)]
        self.seq_len, self.batch_size, self.seed, self._rows = seq_len, batch_size, seed, self._streams[0]._rows
        self._edges = np.cumsum(mixture.shares)
        self._edges[-1] = 1.0
        self._block = functools.lru_cache(maxsize=2)(self._draw)

    def __getitem__(self, index: int) -> torch.Tensor:
        """This process's rows of batch `index`, [batch_size / ranks, seq_len + 1], int64."""
        places = [self.place(index * self.batch_size + row) for row in self._rows]
        return torch.cat([windows(self._streams[i].tokens, [start], self.seq_len) for i, start in places])

    def place(self, sequence: int) -> tuple[int, int]:
        """Which stream the window of the given number is of, and where it starts there."""
        block, number = divmod(sequence, BLOCK)
        sources, numbers = self._block(block)
        source = int(sources[number])
        return source, self._streams[source].start(int(numbers[number]))

    def _read(self, blocks: int) -> np.ndarray:
        """Windows of each stream in so many blocks: the shares, rounded so that their sum is right."""
        return np.diff(np.rint(self._edges * (blocks * BLOCK)).astype(np.int64), prepend=0)

    def _draw(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The stream of every window of a block, and its number among that stream's windows."""
        generator = np.random.default_rng([self.seed, block, BLOCK])
        before = self._read(block)
        counts = self._read(block + 1) - before
        numbers = np.concatenate([np.arange(count) for count in counts])
        sources = np.repeat(np.arange(len(counts)), counts)
        order = np.argsort((numbers + generator.random(len(counts))[sources]) / counts[sources])
        return sources[order], (before[sources] + numbers)[order]


def windows(tokens: Tokens, starts: list[int], seq_len: int) -> torch.Tensor:
    """The windows of seq_len + 1 tokens at `starts`, [len(starts), seq_len + 1], int64."""
    return torch.from_numpy(np.stack([np.asarray(tokens.ids[s : s + seq_len + 1], dtype=np.int64) for s in starts]))


def spread(tokens: Tokens, seq_len: int, count: int) -> list[int]:
    """Starts of up to `count` windows spread evenly over a stream without overlap (for evaluation)."""
    fit = (len(tokens) - 1) // seq_len
    count = min(count, fit)
    return [int(i * fit // count) * seq_len for i in range(count)]
