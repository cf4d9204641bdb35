"""Whether reading taught what was read: sentences are held out of every document, and scored before and after it.

What is known of a held-out sentence is how well it is predicted after the one in front of it, which was read. Harm is
the rise on texts that the model itself made before it read anything: what it thought likely and no longer does.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from nestling.generation.stream import Sampling, TextGenerator
from nestling.sessions.notes import measured
from nestling.sessions.readers import open_document
from nestling.sessions.scores import score
from nestling.sessions.snapshots import recall_nearest
from nestling.training.tokenizers import encode
from nestling.utils.files import write_text

if TYPE_CHECKING:
    from nestling.cms.cache import LevelsCache

EACH = 8  # one sentence of so many is held out
MOST = 64  # of a document
SHORTEST, LONGEST = 20, 400  # characters of a sentence
LEAD = 64  # tokens of the sentence in front
MADE, PIECES = 64, 4  # tokens of a text that the model makes, and how many it makes
ANCHORS = range(PIECES, PIECES + 8)  # seeds of those that hold it while it learns: others than harm is measured on
_END = re.compile(r"(?<=[.!?…])[\"'”’)]*\s+|\n+")


@dataclass(frozen=True)
class Held:
    """A sentence that is not read, and the one in front of it, which is."""

    lead: str
    sentence: str


def sentences(text: str) -> list[str]:
    """A text cut behind each sentence or line; together they are the text."""
    ends = [0, *(found.end() for found in _END.finditer(text)), len(text)]
    return [text[a:b] for a, b in zip(ends, ends[1:]) if a < b]


def held_out(text: str) -> tuple[str, list[Held]]:
    """A text without some of its sentences, spread over it, and those; the same for the same text."""
    parts = sentences(text)
    fit = [i for i in range(1, len(parts)) if SHORTEST <= len(parts[i].strip()) <= LONGEST and parts[i - 1].strip()]
    chosen: list[int] = []
    first = min(EACH // 2, len(fit) - 1) if len(fit) > 1 else EACH  # of a short note one, but never all there is
    for i in fit[first :: max(EACH, -(-len(fit) // MOST))]:
        if not chosen or i - 1 > chosen[-1]:  # what leads to it is read
            chosen.append(i)
    rest = "".join(part for i, part in enumerate(parts) if i not in set(chosen))
    return rest, [Held(parts[i - 1].strip(), parts[i].strip()) for i in chosen]


def open_rest(path: Path) -> BinaryIO:
    """A document without what is held out of it."""
    return io.BytesIO(held_out(_text(path))[0].encode())


class Checker:
    """Scores what is held out of documents, and texts that the model made before it read anything.

    Args:
        model: with levels that learn; what it makes is the same every time.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def before(self, path: Path, cache: LevelsCache) -> dict[str, Any]:
        """What is known of a document that is about to be read: without levels, and by them."""
        return {
            part: {"without": score_of(None), "before": score_of(cache)}
            for part, score_of in (("sentences", lambda c: self.known(path, c)), ("elsewhere", self.elsewhere))
        } | {"count": len(held_out(_text(path))[1])}

    def after(self, path: Path, cache: LevelsCache, before: dict[str, Any]) -> dict[str, Any]:
        """That, and what is known now."""
        now = {
            "sentences": {"after": self.known(path, cache)},
            "elsewhere": {"after": self.elsewhere(cache), "chosen": self.elsewhere(cache, choose=True)},
        }
        return before | {part: before[part] | found for part, found in now.items()}

    def known(self, path: Path, cache: LevelsCache | None) -> dict[str, float | None]:
        """How well a document's held-out sentences are predicted by what a stream has learned, None: by no levels."""
        nats, tokens, size = 0.0, 0, 0
        for held in held_out(_text(path))[1]:
            lead, ids = encode(self.tokenizer, held.lead)[-LEAD:], encode(self.tokenizer, " " + held.sentence)
            nats -= float(self._score(lead + ids, cache)[len(lead) :].double().sum())
            tokens, size = tokens + len(ids), size + len(held.sentence.encode()) + 1
        return measured(nats, tokens, size)

    def elsewhere(self, cache: LevelsCache | None, choose: bool = False) -> dict[str, float | None]:
        """How well what the model made is predicted by what a stream has learned.

        choose: whether that is taken to the second half of each is chosen by the first, as for a question or a document
        (`nestling.sessions.snapshots`); the first half is predicted by nothing learned.
        """
        logs = [
            self._scored_by_halves(ids, cache) if choose and cache else self._score(ids, cache) for ids in self.made
        ]
        size = sum(len(self.tokenizer.decode(ids).encode()) for ids in self.made)
        return measured(-sum(float(found.double().sum()) for found in logs), sum(map(len, self.made)), size)

    def _scored_by_halves(self, ids: list[int], cache: LevelsCache) -> Tensor:
        half, then = len(ids) // 2, cache.fork()
        recall_nearest(self.model, then, ids[:half], self.tokenizer.eos_token_id, self.model.learner.context)
        return torch.cat([self._score(ids, None)[:half], self._score(ids, then)[half:]])

    @cached_property
    def made(self) -> list[list[int]]:
        """Ids of texts that the model makes out of nothing."""
        return own_texts(self.model, self.tokenizer, range(PIECES))

    def _score(self, ids: list[int], cache: LevelsCache | None) -> Tensor:
        return score(self.model, cache, ids, self.tokenizer.eos_token_id, self.model.learner.context)


def own_texts(model: Any, tokenizer: Any, seeds: range) -> list[list[int]]:
    """Ids of texts that a model, without its levels, makes out of nothing; the same for the same seeds."""
    learning, model.learning = model.learning, False
    try:
        writers = (TextGenerator(model, tokenizer, seed=n) for n in seeds)
        texts = ["".join(writer.stream("", MADE, Sampling(1.0))) for writer in writers]
    finally:
        model.learning = learning
    return [ids for text in texts if (ids := encode(tokenizer, text))]


def check_page(result: dict[str, Any], path: Path | None = None) -> str:
    """What a checked session found, as a page of Markdown; written to `path` if given."""
    rows = [row["check"] | {"name": row["name"]} for row in result["documents"]]
    lines = [
        "# What was learned by reading", "",
        "Bits per byte, lower is better, in a fresh context. Of every document some sentences were held out and never "
        "read: how well each is predicted after the sentence in front of it by the model without levels, and by its "
        "levels before and after it read the rest. Elsewhere: texts that the model itself made before it read "
        "anything; a rise is harm. Chosen: after, where the first half of each decides whether what was learned is "
        "taken to the second, as `nestling ask` decides by the question.", "",
        "| document | sentences | without levels | before | after "
        "| elsewhere, without levels | before | after | chosen |",
        "| --- |" + " ---: |" * 8,
    ]  # fmt: skip
    for row in rows:
        known = [row[part][name] for part in ("sentences", "elsewhere") for name in ("without", "before", "after")]
        cells = [*known, row["elsewhere"].get("chosen", measured(0.0, 0, 0))]  # documents of before it was measured
        bits = ("-" if cell["bits_per_byte"] is None else f"{cell['bits_per_byte']:.3f}" for cell in cells)
        name = row["name"].replace("|", "\\|")
        lines.append(f"| {name} | {row['count']} | {' | '.join(bits)} |")
    lines += ["", f"State: {result['state']}, {result['state_bytes'] / 1e6:,.1f} MB."]
    text = "\n".join(lines) + "\n"
    if path is not None:
        write_text(path, text)
    return text


def _text(path: Path) -> str:
    with open_document(path) as file:
        return file.read().decode()
