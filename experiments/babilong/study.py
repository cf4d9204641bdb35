"""A contender trained on facts in short texts, and asked after texts of up to a million bytes."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from experiments.babilong.tasks import TASKS, Question
from experiments.needles.study import NeedleContender, Needles, NeedlesWork, learn
from experiments.shared.models.drawn import size
from experiments.shared.models.tasks import TaskJob
from experiments.shared.work import Progress, curve

PIECE = 512  # bytes of a text that are read at once


@dataclass
class FactsContender(NeedleContender):
    """`longest`: bytes of the longest texts that it is asked after; 0: all."""

    longest: int = 0


@dataclass
class Babilong(Needles):
    """The training is that of `needles`; the texts of the tests."""

    known: ClassVar[Mapping[str, Any]] = TASKS
    name: str = "babilong"
    contenders: list[FactsContender] = field(default_factory=list)
    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    texts: dict[str, int] = field(
        default_factory=lambda: {
            "256": 128, "1024": 128, "4096": 64, "16384": 32, "65536": 16, "262144": 8, "1048576": 4,
        }
    )  # fmt: skip
    together: int = 8  # texts read side by side

    def smoke(self) -> Babilong:
        few = [asdict(c) | {"head_size": 8, "runs": {}} for c in self.contenders]
        return self.changed(
            contenders=few, width=16, parameters=40_000, batch_size=2, steps=2, seeds=[0], together=2,
            texts={"256": 2, "1024": 3},
        )  # fmt: skip

    def decisive(self, job: TaskJob) -> dict[str, Any]:
        """All but what only the tests of `needles` have."""
        values = super().decisive(job)
        return {name: value for name, value in values.items() if name not in ("times", "tested")}


class BabilongWork(NeedlesWork):
    settings: Babilong

    def run(self, job: TaskJob, progress: Progress | None) -> dict[str, Any]:
        settings, contender = self.settings, self.settings.contender(job.contender)
        task = settings.known[job.task]
        model, losses = learn(settings, contender, task, job.seed, self.train_text, progress, self.device)
        rng, found = random.Random(10_000 + job.seed), {}
        for length, count in settings.texts.items():
            told = [task.ask(rng, int(length), self.test_text) for _ in range(count)]
            if not contender.longest or int(length) <= contender.longest:
                # attention reads at once what it can: in pieces its masks would cost more than it does
                found[length] = asked(model, told, settings.together, contender.longest or PIECE)
        return {"parameters": size(model), "found": found, "curve": curve(losses, 30)}

    def result(self, row: dict[str, Any]) -> str:
        return " / ".join(f"{100 * found['answers']:.1f}" for found in row["found"].values())


def asked(
    model: nn.Module, told: list[tuple[str, list[Question]]], together: int, piece: int = PIECE
) -> dict[str, float]:
    """Shares of questions answered with every byte right, and processor seconds for each byte read before them.

    `moved`: of those about people with more than one fact; `last`: the share that the text's last place answers.
    """
    model.eval()
    answers: list[tuple[Question, bool]] = []
    seconds = total = 0.0
    for first in range(0, len(told), together):
        part = told[first : first + together]
        started = time.thread_time()
        cache = read(model, [text for text, _ in part], piece)
        seconds, total = seconds + time.thread_time() - started, total + sum(len(text) for text, _ in part)
        for number in range(max(len(questions) for _, questions in part)):
            # a text with fewer questions is asked its first one again, and that does not count
            questions = [own[number] if number < len(own) else own[0] for _, own in part]
            right = answered(model, cache, questions)
            answers += [(q, r) for q, r, (_, own) in zip(questions, right, part) if number < len(own)]
    moved = [right for question, right in answers if question.facts > 1]
    return {
        "answers": sum(right for _, right in answers) / len(answers),
        "moved": sum(moved) / len(moved) if moved else float("nan"),
        "last": sum(q.place == q.last for q, _ in answers) / len(answers),
        "questions": len(answers),
        "seconds_per_byte": seconds / total,
    }


@torch.no_grad()
def read(model: nn.Module, texts: list[str], piece: int = PIECE) -> Any:
    """The cache after texts of one length, read in pieces side by side."""
    device, cache = next(model.parameters()).device, None
    tokens = torch.tensor([list(text.encode("latin-1")) for text in texts])
    for part in tokens.split(piece, 1):
        cache = model(part.to(device), past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
    return cache


@torch.no_grad()
def answered(model: nn.Module, cache: Any, questions: list[Question]) -> list[bool]:
    """Whether each question's answer is named whole, each byte after the right ones before it."""
    device = next(model.parameters()).device
    lengths = [(len(q.asked), len(q.place)) for q in questions]
    longest = max(asked + place for asked, place in lengths)
    text = [(q.asked + q.place).ljust(longest).encode("latin-1") for q in questions]
    tokens = torch.tensor([list(line) for line in text], device=device)
    named = model(tokens[:, :-1], past_key_values=copy.deepcopy(cache), use_cache=True).logits.argmax(-1)
    right = named == tokens[:, 1:]
    return [bool(row[asked - 1 : asked - 1 + place].all()) for row, (asked, place) in zip(right, lengths)]
