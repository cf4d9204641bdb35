"""What the streams are made of: five domains, in an order and from a place of their own for every seed."""

from __future__ import annotations

import functools
import hashlib
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.defaults.texts import Source

DOMAINS = {
    "moby": "books/herman-melville--moby-dick.txt",
    "war": "books/leo-tolstoy--war-and-peace.txt",
    "galela": "bible/galela",
    "uma": "bible/uma",
    "code": "python",
}
ELSEWHERE = {"chancery": "books/charles-dickens--bleak-house.txt", "dorothea": "books/george-eliot--middlemarch.txt"}
# those that every machine has: enough to see the experiment work
SMOKE = {name: f"python/{name}.py" for name in ("argparse", "inspect", "typing")}
SMOKE_ELSEWHERE = {"shelve": "python/shelve.py"}
TUNING_SEED = 100  # seeds from here on read the last part of each text, which no other seed reads
ROOM = 16  # characters taken for each token that is wanted


@dataclass(frozen=True)
class Domain:
    """Parts of one domain as tokens, one after the other in its text: to read first, on return, and to be asked for."""

    name: str
    first: list[int]
    back: list[int]
    probe: list[int]


@functools.lru_cache(maxsize=16)
def whole(place: str, folder: str) -> str:
    """A text; "python" is all modules of the standard library that are one file."""
    if place == "python":
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
    return Source("", "", place, 0.0, 0).text(Path(folder), 10**9)


def digest(places: dict[str, str], folder: Path) -> str:
    """Of the texts as they stand on this machine: Python's own files differ between versions."""
    texts = [whole(place, str(folder)) for place in places.values()]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def tokens(place: str, folder: Path, tokenizer: Any, share: float, count: int) -> list[int]:
    """`count` tokens from the share `share` of a text on.

    Raises:
        ValueError: the text is too short.
    """
    text = whole(place, str(folder))
    begin = text.find("\n", int(share * len(text))) + 1
    ids = tokenizer(text[begin : begin + ROOM * count], add_special_tokens=False)["input_ids"][:count]
    if len(ids) < count:
        raise ValueError(
            f"{place} holds {len(ids):,} tokens from {share:.2f} of it on; {count:,} are wanted: read less"
        )
    return ids


def draw(places: dict[str, str], folder: Path, tokenizer: Any, seed: int, sizes: tuple[int, int, int]) -> list[Domain]:
    """The domains of a seed in its order; `sizes` in tokens: at first, on return, of what is asked for."""
    rng, found = random.Random(seed), []
    for name in rng.sample([*places], len(places)):
        share = rng.uniform(0.62, 0.70) if seed >= TUNING_SEED else rng.uniform(0.02, 0.3)
        ids = tokens(places[name], folder, tokenizer, share, sum(sizes))
        first, back = sizes[0], sizes[0] + sizes[1]
        found.append(Domain(name, ids[:first], ids[first:back], ids[back:]))
    return found


def size(tokenizer: Any, ids: Tensor | list[int]) -> int:
    """Bytes of the text of tokens."""
    return max(1, len(tokenizer.decode(torch.as_tensor(ids).tolist()).encode()))
