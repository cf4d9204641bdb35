"""Knowledge incorporation: read new documents once, and answer questions about them after the context is gone.

The documents are biographies of invented people; every question has a closed set of answers, the values that occur in
the documents, and the likeliest one counts as given. How far reading harms what the model could do before is measured
on ordinary book text.
"""

from __future__ import annotations

import copy
import functools
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.knowledge import biographies, pages, report
from experiments.knowledge.biographies import Question, World
from experiments.shared.continual.choice import weigh
from experiments.shared.continual.pretrained import pretrained
from experiments.shared.continual.streams import (
    adapted,
    finetune,
    learner,
    owned,
    pieces,
    prefilled,
    read,
)  # fmt: skip
from experiments.shared.continual.study import ContinualStudy, ContinualWork, LearnerContender, StreamJob
from experiments.shared.data import find_data
from experiments.shared.report import spread
from experiments.shared.retrieval import best
from experiments.shared.work import Progress, Row
from nestling.cms.anchor import set_anchor
from nestling.cms.defaults import default_levels, fast_levels
from nestling.sessions.check import ANCHORS, own_texts
from nestling.sessions.sleep import LEAST, readings, shuffled
from nestling.sessions.snapshots import FIRST, nearest

GROUP = "Continual learning"
QUESTION = "Documents read once: can it answer when they are gone?"

BASE = report.BASE
PROMPT = "Question: {question}\nAnswer: {opening}"
BETWEEN = "\n\n"  # of two documents
FOUND = 3  # passages that retrieval puts in front of a question
ON_PAGES = (BASE, "in context", "retrieval", "default", "default, sleep")
WIDTH = {"placement": "width", "width": 27}  # the state of two levels is under 5% of the model's weights


@dataclass
class Knowledge(ContinualStudy):
    """Sizes of the documents and of the text on which harm is measured."""

    name: str = "knowledge"
    people: int = 8
    paraphrases: int = 4  # texts about each of them
    context: int = 512  # tokens after which attention begins anew while levels read
    other_text: str = "leo-tolstoy--war-and-peace.txt"
    other_length: int = 512  # tokens of each of `other_parts` parts of that text
    other_parts: int = 4

    def methods(self) -> tuple[str, ...]:
        return ("none", "context", "retrieval", "levels", "finetune")

    def smoke(self) -> Knowledge:
        chosen = [c for c in self.contenders if c.name in (BASE, "in context", "1 level", "fine-tuning, same weights")]
        return replace(self, contenders=chosen, people=2, paraphrases=1, other_length=64, seeds=[0, 1])


def defaults() -> Knowledge:
    """The experiment's settings."""

    def levels(lr: float, *sizes: int) -> list[dict[str, Any]]:
        return [{"chunk_size": size, "lr": lr, "optimizer": "adamw"} for size in sizes]

    one = levels(2e-4, 64)  # this and all other rates were chosen on seed 100
    return Knowledge(contenders=[
        LearnerContender(BASE, "none"),
        LearnerContender("in context", "context"),
        LearnerContender("retrieval", "retrieval", options={"passages": FOUND}),
        LearnerContender("1 level", "levels", one),
        LearnerContender("default", "levels"),
        LearnerContender("default, fast", "levels", [level.to_dict() for level in fast_levels(None)]),
        LearnerContender("default, short context", "levels", stack={"context": 64}),
        LearnerContender("default, as notes", "levels", options={"least": LEAST}),
        LearnerContender("default, sleep", "levels", options={"sleep": 1}),
        LearnerContender("default, sleep, anchored", "levels", options={"sleep": 1, "anchor": 16.0}),
        LearnerContender("2 levels", "levels", levels(2e-4, 64, 256)),
        LearnerContender("3 levels", "levels", levels(2e-4, 64, 256, 512)),
        LearnerContender("1 level, width", "levels", levels(5e-4, 64), WIDTH),
        LearnerContender("2 levels, width", "levels", levels(5e-4, 64, 256), WIDTH),
        LearnerContender("2 levels, width, high rate", "levels", levels(4e-3, 64, 256), WIDTH),
        LearnerContender("fine-tuning, same weights", "finetune", one, options={"lr": 1e-4, "size": 64}),
        LearnerContender("fine-tuning, all weights", "finetune", options={"lr": 1e-4, "size": 64}),
    ])  # fmt: skip


def taught(
    model: nn.Module, settings: Knowledge, contender: LearnerContender, turns: list[Tensor]
) -> tuple[nn.Module, Any, list[int]]:
    """Let a contender learn from the documents [1, T], and then from each further turn out of sight of the ones before:
    the model, its cache without context (levels), and updates. With `least` each turn is learned to its end."""
    if contender.method == "levels":
        own = contender.levels or [level.to_dict() for level in default_levels(model.config)]
        model = learner(model, replace(contender, levels=own, stack={"context": settings.context} | contender.stack))
        if weight := contender.options.get("anchor"):
            made = own_texts(model, pretrained(settings.model, settings.dtype)[1], ANCHORS)
            set_anchor(model, [[model.config.eos_token_id, *found] for found in made], weight)
        cache = None
        for turn in turns:
            _, cache = read(model, turn, cache)
            if "least" in contender.options:
                model.finish(cache, turn[:, :1])  # the token that opens the next one
            cache.forget_context()
            cache.tail = None
        updates = [level.updates if level else 0 for level in cache.levels.levels]
        return model, cache, updates
    if contender.method == "finetune":
        model = learner(model, contender)
        tuned = owned(model) if contender.levels else list(model.parameters())
        losses, _ = finetune(model, pieces(turns[0], contender.options["size"]), contender.options["lr"], tuned)
        return model, None, [len(losses)]
    return model, None, []


def answers(
    model: nn.Module, questions: list[Question], encode: Callable[[str], list[int]], context: Any = None
) -> list[list[float]]:
    """The log-probability of every choice of every question, in nats."""
    return [
        weigh(model, encode(PROMPT.format(question=q.text, opening=q.opening)), [encode(f" {c}") for c in q.choices],
              context)[0]
        for q in questions
    ]  # fmt: skip


def retrieved(model: nn.Module, world: World, encode: Callable[[str], list[int]], passages: int) -> list[list[float]]:
    """The answers to each question with the passages in front of it that share most with it."""
    texts = [line for text in world.texts for line in text.splitlines() if line.strip()]
    found = []
    for q in world.questions:
        shown = BETWEEN.join(best(f"{q.text} {q.opening}", texts, passages)) + BETWEEN
        found += answers(model, [q], encode, prefilled(model, encode(shown)))
    return found


def measures(
    questions: list[Question], likely: list[list[float]], before: list[list[float]] | None = None
) -> dict[str, float]:
    """How well questions were answered.

    Args:
        before: the answers without anything read, where every question has choices of its own.

    Returns:
        accuracy: the likeliest choice is right.  calibrated: the same, with each choice measured against its mean over
        all people (what the model says of anybody tells nothing), or against `before`.
        right: log-probability of the right choice.
        margin: the same minus the mean of the wrong ones.
    """
    groups: dict[str, list[list[float]]] = {}
    for q, found in zip(questions, likely, strict=True):
        groups.setdefault(q.attribute, []).append(found)
    usual = {a: [sum(c) / len(c) for c in zip(*rows)] for a, rows in groups.items()}
    total = dict.fromkeys(("accuracy", "calibrated", "right", "margin"), 0.0)
    for n, (q, found) in enumerate(zip(questions, likely, strict=True)):
        against = before[n] if before else usual[q.attribute]
        apart = [x - u for x, u in zip(found, against, strict=True)]
        wrong = [x for i, x in enumerate(found) if i != q.answer]
        total["accuracy"] += max(range(len(found)), key=found.__getitem__) == q.answer
        total["calibrated"] += max(range(len(apart)), key=apart.__getitem__) == q.answer
        total["right"] += found[q.answer]
        total["margin"] += found[q.answer] - sum(wrong) / len(wrong)
    return {name: value / len(questions) for name, value in total.items()}


def chance(questions: list[Question]) -> float:
    """The accuracy of guessing."""
    return sum(1 / len(q.choices) for q in questions) / len(questions)


@functools.lru_cache(maxsize=8)
def other(path: Path, settings_key: tuple[str, str, int, int], seed: int) -> tuple[Tensor, int]:
    """Parts of ordinary text [parts, T], and the bytes of all but their first tokens."""
    model, dtype, parts, length = settings_key
    _, tokenizer = pretrained(model, dtype)
    text, draw, rows = path.read_text(encoding="utf-8"), random.Random(seed), []
    for _ in range(parts):
        start = text.index(" ", int(draw.uniform(0.02, 0.9) * len(text))) + 1
        rows.append(tokenizer(text[start : start + 12 * length], add_special_tokens=False)["input_ids"][:length])
    size = sum(len(tokenizer.decode(row[1:]).encode()) for row in rows)
    return torch.tensor(rows), size


@dataclass(frozen=True)
class KnowledgeJob(StreamJob):
    """One contender on one set of people, or on the pages."""

    world: str = "people"

    @property
    def key(self) -> str:
        return super().key if self.world == "people" else f"{self.world} {super().key}"


class KnowledgeWork(ContinualWork):
    def __init__(self, settings: Knowledge, folder: Path) -> None:
        file = folder / settings.other_text
        super().__init__(settings, f"{file.name} {file.stat().st_size}")
        self.file = file

    def reads(self, job: KnowledgeJob) -> str:
        """The default's levels too, which a contender does not name."""
        contender = self.settings.contender(job.contender)
        default = contender.method == "levels" and not contender.levels
        found = f"{self.data} {default_levels(None)}" if default else self.data
        return found if job.world == "people" else f"{found} {pages.build()}"

    def run(self, job: KnowledgeJob, progress: Progress | None) -> dict[str, Any]:
        settings, contender = self.settings, self.settings.contender(job.contender)
        plain, tokenizer = pretrained(settings.model, settings.dtype)

        def encode(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        on_pages = job.world == "pages"
        world = pages.build() if on_pages else biographies.build(settings.people, settings.paraphrases, job.seed)
        text = BETWEEN.join(world.texts) + BETWEEN
        documents = torch.tensor([encode(text)])
        slept = [shuffled(text, turn + 1) + BETWEEN for turn in range(contender.options.get("sleep", 0))]
        started = time.thread_time()
        turns = [documents, *(torch.tensor([encode(t)]) for t in slept)]
        if least := contender.options.get("least"):  # a document of each text, as `nestling learn` reads short ones
            notes = [torch.tensor([[tokenizer.eos_token_id, *encode(t)]]) for t in world.texts]
            turns = [note for note in notes for _ in range(readings(note.shape[1] - 1, least))]
        model, cache, updates = taught(plain, settings, contender, turns)
        seconds = time.thread_time() - started
        parts, size = other(
            self.file, (settings.model, settings.dtype, settings.other_parts, settings.other_length), job.seed
        )
        with adapted(model, cache):
            context = prefilled(model, documents[0].tolist()) if contender.method == "context" else None
            likely = (
                retrieved(model, world, encode, contender.options["passages"]) if contender.method == "retrieval"
                else answers(model, world.questions, encode, context)
            )  # fmt: skip
            before = answers(plain, world.questions, encode) if on_pages and contender.method != "none" else likely
            found = measures(world.questions, likely, before if on_pages else None)
            found |= {"by_attribute": by_attribute(world, likely, before if on_pages else None)}
            losses = token_losses(model, parts)
        bits = losses.sum().item() / math.log(2) / size
        if contender.method == "levels" and not contender.levels and not on_pages:
            found["choice"] = choice(plain, model, cache, world, encode, likely, parts, size, tokenizer.eos_token_id)
        return found | {"other_bits": bits, "updates": updates, "tokens": documents.shape[1],
                        "read": sum(turn.shape[1] for turn in turns),
                        "learning_seconds": seconds, "chance": chance(world.questions)}  # fmt: skip

    def result(self, row: dict[str, Any]) -> str:
        return f"{row['accuracy']:.2f} right, margin {row['margin']:.2f}, other text {row['other_bits']:.3f}"


def token_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """The losses [B, T - 1] of a model that learns nothing, in nats."""
    logits = model(ids[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().mT, ids[:, 1:], reduction="none")


def choice(
    plain: nn.Module, model: nn.Module, cache: Any, world: World, encode: Callable[[str], list[int]],
    likely: list[list[float]], parts: Tensor, size: int, start: int,
) -> dict[str, float]:  # fmt: skip
    """The measures where a reader chooses by each question, and by the beginning of each part of ordinary text, whether
    it takes what was learned (`nestling.sessions.snapshots`). In float32: the model is widened.

    Args:
        likely: the answers by what was learned.  start: the token that a question begins after.

    Returns:
        calibrated: accuracy.  taken: the share of questions that what was learned answers.
        other_bits, other_without: bits per byte of the parts, whose first tokens are predicted by nothing learned in
        both, and of the parts by nothing learned.
    """
    plain, model = copy.deepcopy(plain).float(), model.float()
    questions = [encode(PROMPT.format(question=q.text, opening=q.opening)) for q in world.questions]
    with torch.no_grad():
        taken = [nearest(model, cache, ids, start) is None for ids in questions]
        without = [own if t else answers(plain, [q], encode)[0] for q, t, own in zip(world.questions, taken, likely)]
        nats = token_losses(plain, parts)
        chosen = nats.clone()
        for row, part in enumerate(parts):
            if nearest(model, cache, part[1 : FIRST + 1].tolist(), int(part[0])) is None:
                with adapted(model, cache):
                    chosen[row, FIRST:] = token_losses(model, part[None])[0, FIRST:]
    bits = [x.sum().item() / math.log(2) / size for x in (chosen, nats)]
    return {"calibrated": measures(world.questions, without)["calibrated"], "taken": sum(taken) / len(taken),
            "other_bits": bits[0], "other_without": bits[1]}  # fmt: skip


def by_attribute(world: World, likely: list[list[float]], before: list[list[float]] | None = None) -> dict[str, float]:
    """The calibrated accuracy of the questions about each attribute, or page."""
    found = {}
    for attribute in dict.fromkeys(q.attribute for q in world.questions):
        mine = [n for n, q in enumerate(world.questions) if q.attribute == attribute]
        asked, own = [world.questions[n] for n in mine], [likely[n] for n in mine]
        found[attribute] = measures(asked, own, [before[n] for n in mine] if before else None)["calibrated"]
    return found


def work(settings: Knowledge, data: str | Path | None, smoke: bool) -> KnowledgeWork:
    """What does the jobs; of `data`, the books, only `other_text` is read."""
    source = "a long book as plain text, for example a public-domain one from standardebooks.org (-o other_text=NAME)"
    return KnowledgeWork(settings, find_data(data, "books", [settings.other_text], source))


def plan(settings: Knowledge, contenders: list[LearnerContender], row: Row) -> list[KnowledgeJob]:
    """Every contender on every seed; some on the pages, on the first."""
    first = settings.seeds[0]
    chosen = [KnowledgeJob(c.name, first, world="pages") for c in contenders if c.name in ON_PAGES]
    return [KnowledgeJob(c.name, seed) for seed in settings.seeds for c in contenders] + chosen


def summarize(settings: Knowledge, contenders: list[LearnerContender], row: Row) -> dict[str, Any]:
    """Means and spreads over seeds; gains and harm are taken against the closed book on the same seed."""
    found, base = [], {seed: row(KnowledgeJob(BASE, seed)) for seed in settings.seeds}
    tokens = chance_ = None
    for contender in contenders:
        rows = {seed: r for seed in settings.seeds if (r := row(KnowledgeJob(contender.name, seed)))}
        if not rows:
            continue
        pairs = [(r, base[seed]) for seed, r in rows.items() if base[seed]]
        first, chosen = next(iter(rows.values())), [r["choice"] for r in rows.values() if "choice" in r]
        tokens, chance_ = spread(r["tokens"] for r in rows.values()), first["chance"]
        found.append({
            "contender": contender.name,
            "method": contender.method,
            "levels": contender.levels,
            "options": contender.options,
            "updates": first["updates"],
            **{k: spread(r[k] for r in rows.values()) for k in ("accuracy", "calibrated", "margin")},
            "learning_seconds": spread(r["learning_seconds"] for r in rows.values()),
            "gain": spread(r["right"] - b["right"] for r, b in pairs),
            "harm": spread(r["other_bits"] - b["other_bits"] for r, b in pairs),
            "chosen": {
                "calibrated": spread(c["calibrated"] for c in chosen),
                "taken": spread(c["taken"] for c in chosen),
                "harm": spread(c["other_bits"] - c["other_without"] for c in chosen),
            } if chosen else None,
            "by_attribute": {a: spread(r["by_attribute"][a] for r in rows.values()) for a in first["by_attribute"]},
        })  # fmt: skip
    return {
        "experiment": "knowledge",
        "people": settings.people,
        "paraphrases": settings.paraphrases,
        "tokens": tokens,
        "chance": chance_,
        "seeds": len(settings.seeds),
        "contenders": found,
        "pages": report.on_pages(
            {c.name: row(KnowledgeJob(c.name, settings.seeds[0], world="pages")) for c in contenders}
        ),
    }


table, plot = report.table, report.plot
