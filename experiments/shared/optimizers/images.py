"""Fashion-MNIST from a folder, and synthetic images for a trial without data."""

from __future__ import annotations

import functools
import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.shared.data import find_data

SOURCE = "get the four .gz files of Fashion-MNIST from github.com/zalandoresearch/fashion-mnist (data/fashion)"
_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


@dataclass(frozen=True)
class Images:
    """`train` and `test`: (images [N, side, side] of mean 0 and deviation 1, labels [N]); and a fingerprint."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    fingerprint: str


def find_folder(folder: str | Path | None) -> Path:
    """The folder of the images: `folder`, else `fashion-mnist` in the one that NESTLING_DATA names.

    Raises:
        ValueError: no folder is known, or a file of the data set is missing.
    """
    return find_data(folder, "fashion-mnist", [name for pair in _FILES.values() for name in pair], SOURCE)


@functools.lru_cache(maxsize=2)
def load_images(folder: str) -> Images:
    """All images of a folder, normalised by the training images. ValueError for a file of another format."""
    raw = {part: [_idx(Path(folder) / name) for name in names] for part, names in _FILES.items()}
    mean, deviation = raw["train"][0].mean(), raw["train"][0].std()

    def prepared(part: str) -> tuple[Tensor, Tensor]:
        images, labels = raw[part]
        return torch.from_numpy((images.astype(np.float32) - mean) / deviation).float(), torch.from_numpy(
            labels.astype(np.int64)
        )

    digest = hashlib.sha256(raw["train"][0][:100].tobytes() + raw["test"][0].tobytes()).hexdigest()[:12]
    return Images(prepared("train"), prepared("test"), digest)


def _idx(path: Path) -> np.ndarray:
    content = gzip.decompress(path.read_bytes())
    dimensions = content[3]
    if content[:3] != b"\0\0\x08" or dimensions not in (1, 3):
        raise ValueError(f"{path} is not an idx file of bytes (images or labels)")
    shape = np.frombuffer(content, ">i4", dimensions, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


@functools.lru_cache(maxsize=2)
def synthetic(count: int = 400, side: int = 28) -> Images:
    """Ten blurred patterns under noise: learnable in seconds, no data needed."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(10, 4, 4, generator=generator).repeat_interleave(side // 4, 1)
    patterns = patterns.repeat_interleave(side // 4, 2)

    def draw(number: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(0, 10, (number,), generator=generator)
        return patterns[labels] + torch.randn(number, side, side, generator=generator), labels

    return Images(draw(count), draw(count // 4), f"synthetic-{count}-{side}")
