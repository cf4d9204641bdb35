"""Books of different authors one after the other, then the first again (NL Sec. 9): transfer, forgetting, and what each
level holds.

A model reads a part of every book of a sequence, and at the end another part of the first one. Between the books it is
asked, with nothing in its context, for parts of each that it never reads. Contenders own the same weights: one level,
several, levels that decide themselves when to update, fine-tuning.
"""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.domains import report
from experiments.shared.continual.pretrained import pretrained
from experiments.shared.continual.rows import by_contender
from experiments.shared.continual.student import FINE_TUNING, Student
from experiments.shared.continual.study import ContinualStudy, ContinualWork, LearnerContender, StreamJob
from experiments.shared.data import find_data
from experiments.shared.work import Progress, Row

GROUP = "Continual learning"
QUESTION = "Books one after the other and back to the first: transfer, forgetting, which level holds what?"

BASE = report.BASE
BLOCKS = [1, 6, 11, 16, 21, 26]  # of 30; on tuning seeds better than the last six, at equal parameters
RATES = {128: 5e-4, 512: 1e-3, 2048: 2e-3}  # by chunk size, chosen on tuning seeds
TUNING_SEED = 100  # seeds from here on read the last quarter of the books, which no other seed reads
SOURCE = "books as .txt files, one author each, for example long public-domain ones from standardebooks.org"


@dataclass
class Domains(ContinualStudy):
    """Sizes of the stream and of the parts that test it."""

    name: str = "domains"
    books: int = 4  # of those in the folder, in an order drawn anew for every seed
    length: int = 1536  # tokens of each, and of the return to the first
    context: int = 512  # tokens after which attention begins anew, and tokens of a fine-tuning step
    probes: int = 2  # parts of each book, `context` tokens long, that are never read

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length % self.context:
            raise ValueError(f"length {self.length} must be a multiple of context {self.context}")

    def methods(self) -> tuple[str, ...]:
        return ("attention", "levels", FINE_TUNING)

    def smoke(self) -> Domains:
        chosen = [c for c in self.contenders if c.name in (BASE, "3 levels", "fine-tuning")]
        return replace(self, contenders=chosen, books=2, length=256, context=128, probes=1, seeds=[0, 1])


@dataclass(frozen=True)
class Book:
    """Parts of one book, as tokens: to read first, to read on return, and to be asked for [n, context]."""

    name: str
    first: list[int]
    back: list[int]
    probes: Tensor


@functools.lru_cache(maxsize=8)
def text_of(path: str) -> str:
    """A file's text."""
    return Path(path).read_text(encoding="utf-8")


def draw(settings: Domains, folder: Path, tokenizer: Any, seed: int) -> list[Book]:
    """The books of a seed in their order. Tuning seeds take all parts from the end of a book, the others from before.

    Raises:
        ValueError: too few books, or too short ones.
    """
    rng, tuning = random.Random(seed), seed >= TUNING_SEED
    files = sorted(folder.glob("*.txt"))
    if len(files) < settings.books:
        raise ValueError(f"{folder} holds {len(files)} .txt files, but books is {settings.books}: {SOURCE}")
    found = []
    for file in rng.sample(files, settings.books):
        start = rng.uniform(0.72, 0.76) if tuning else rng.uniform(0.02, 0.48)
        sizes = (settings.length, settings.length, settings.probes * settings.context)
        first, back, rest = (part(file, tokenizer, start + 0.1 * n, size) for n, size in enumerate(sizes))
        found.append(Book(file.stem, first, back, torch.tensor(rest).view(settings.probes, settings.context)))
    return found


def part(file: Path, tokenizer: Any, share: float, count: int) -> list[int]:
    """`count` tokens of a book from the share `share` of its text on, at most a tenth of it."""
    text = text_of(str(file))
    start = text.index(" ", int(share * len(text))) + 1
    text = text[start : start + min(12 * count, len(text) // 10)]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:count]
    if len(ids) < count:
        raise ValueError(f"{file.name} is too short: a tenth of it holds {len(ids)} tokens, {count} are wanted")
    return ids


def size(tokenizer: Any, ids: list[int]) -> int:
    """Bytes of the text of tokens."""
    return len(tokenizer.decode(ids).encode())


class DomainsWork(ContinualWork):
    """Reads streams; `folder` holds the books."""

    def __init__(self, settings: Domains, folder: Path) -> None:
        super().__init__(settings, ",".join(f"{f.name} {f.stat().st_size}" for f in sorted(folder.glob("*.txt"))))
        self.folder = folder

    def run(self, job: StreamJob, progress: Progress | None) -> dict[str, Any]:
        model, tokenizer = pretrained(self.settings.model, self.settings.dtype)
        contender = self.settings.contender(job.contender)
        books = draw(self.settings, self.folder, tokenizer, job.seed)
        student = Student(model, contender, self.settings.context)
        learns = contender.method != "attention"
        known, windows, held = [self.ask(student, books, tokenizer)], [], []
        for place, ids in enumerate([*(b.first for b in books), books[0].back]):
            if place == len(books) and contender.levels and contender.method == "levels":
                held = [self.ask(student, books, tokenizer, level) for level in range(len(contender.levels))]
            bits = [x * self.settings.context / math.log(2) for x in student.read(ids)]
            spans = [ids[at : at + self.settings.context] for at in range(0, len(ids), self.settings.context)]
            windows.append([b / size(tokenizer, s) for b, s in zip(bits, spans, strict=True)])
            if learns:
                known.append(self.ask(student, books, tokenizer))
            if progress:
                progress(place, windows[-1][-1])
        names = [b.name for b in books]
        return {"books": names, "windows": windows, "known": known, "held": held, "updates": student.updates}

    def ask(self, student: Student, books: list[Book], tokenizer: Any, level: int | None = None) -> list[float]:
        """Bits per byte of each book's probes, with nothing in the context; `level` begins anew, for this once."""
        cache = None
        if level is not None:
            cache = student.cache.fork()
            cache.reset(levels=[level])
        found = []
        with student.adapted(cache) as model:
            for book in books:
                logits = model(book.probes[:, :-1], use_cache=False).logits.float()
                nats = F.cross_entropy(logits.flatten(0, 1), book.probes[:, 1:].flatten(), reduction="sum").item()
                found.append(nats / math.log(2) / sum(size(tokenizer, p[1:]) for p in book.probes.tolist()))
        return found

    def result(self, row: dict[str, Any]) -> str:
        means = [sum(w) / len(w) for w in row["windows"]]
        return f"first sight {means[0]:.3f} bits, on return {means[-1]:.3f}"


def work(settings: Domains, data: str | Path | None, smoke: bool) -> DomainsWork:
    """What does the jobs."""
    return DomainsWork(settings, find_data(data, "books", [], SOURCE))


def plan(settings: Domains, contenders: list[LearnerContender], row: Row) -> list[StreamJob]:
    """Every contender on every seed."""
    return [StreamJob(c.name, seed) for seed in settings.seeds for c in contenders]


def summarize(settings: Domains, contenders: list[LearnerContender], row: Row) -> dict[str, Any]:
    """Means and spreads over seeds."""
    return report.summary(settings, by_contender(contenders, settings.seeds, row))


table, plot = report.table, report.plot


def defaults() -> Domains:
    """The experiment's settings."""
    place = {"blocks": BLOCKS, "target_modules": ["down_proj"]}

    def level(size: int, **options: Any) -> dict[str, Any]:
        return {"chunk_size": size, "lr": RATES[size], "optimizer": "adamw"} | options

    fast = level(128, lr=RATES[512], surprise=0.25)
    contenders = [
        LearnerContender(BASE, "attention"),
        LearnerContender("1 level", "levels", [level(128)], place),
        LearnerContender("3 levels", "levels", [level(128), level(512), level(2048)], place),
        LearnerContender("fine-tuning", FINE_TUNING, [level(128)], place, {"lr": 1e-3}),
        LearnerContender("fixed, every 512", "levels", [level(512)], place),
        LearnerContender("adaptive, by gradient", "levels", [fast], place),
        LearnerContender("adaptive, by loss", "levels", [fast | {"signal": "loss"}], place),
    ]
    return Domains(contenders=contenders)
