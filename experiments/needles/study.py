"""A contender trained on short haystacks of one kind, and tested on longer ones."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.needles.tasks import TASKS, batch
from experiments.shared.models.drawn import beside, fitted, size, train
from experiments.shared.models.tasks import TaskJob
from experiments.shared.study import Contender, Study, StudyWork
from experiments.shared.work import Progress, curve
from nestling.models import HopeForCausalLM, sizes
from nestling.models.hope import HopeConfig


@dataclass
class NeedleContender(Contender):
    """A sequence layer with its options, or a pattern of them; `runs`: the seeds of each task, {} is all of them.

    short_window: attention sees no more tokens in half of the first three quarters of the steps (`nestling train`'s
        schedule.short_window); None: as many as the model says.
    """

    mixer: str = "attention"
    options: dict[str, Any] = field(default_factory=dict)
    mixers: list[dict[str, Any]] = field(default_factory=list)
    head_size: int = 64
    runs: dict[str, list[int]] = field(default_factory=dict)
    short_window: int | None = None


@dataclass
class Needles(Study):
    """The numbers of all tasks; a kind of it has its tasks in `known`."""

    known: ClassVar[Mapping[str, Any]] = TASKS
    name: str = "needles"
    contenders: list[NeedleContender] = field(default_factory=list)
    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    test_text: str = ""  # the book that only the tests read; "" is the last one
    layers: int = 2
    width: int = 64
    parameters: int = 160_000
    lr: float = 5e-3
    warmup: int = 50
    steps: int = 3000
    batch_size: int = 16
    length: int = 256  # bytes of a text in training, the most
    shorter: list[int] = field(default_factory=lambda: [96, 128, 192])  # as often each, where the needles have room
    times: list[int] = field(default_factory=lambda: [1, 2, 4, 8])  # of that length, in the tests
    tested: int = 64  # texts of a length
    straw_weight: float = 0.1  # of the loss on all bytes but the answers'

    def smoke(self) -> Needles:
        few = [asdict(c) | {"head_size": 8, "runs": {}} for c in self.contenders]
        return self.changed(
            contenders=few, tasks=["single-1", "multi-query"], width=16, parameters=40_000, batch_size=2, tested=2,
            steps=2, times=[1, 2], seeds=[0],
        )  # fmt: skip

    def decisive(self, job: TaskJob) -> dict[str, Any]:
        """All but which tasks there are, and which book is not read by this one."""
        values = super().decisive(job)
        values.pop("tasks")
        if self.known[job.task].haystack == "noise":
            values.pop("test_text")
        return values


class NeedlesWork(StudyWork):
    """Its books: one text to train on, another to test with, a byte a character."""

    settings: Needles
    anywhere = True

    def __init__(self, settings: Needles, files: list[Path]) -> None:
        held_out = next((f for f in files if f.name == settings.test_text), files[-1])
        self.train_text = " ".join(_text(f) for f in files if f != held_out)
        self.test_text = _text(held_out)
        digest = hashlib.sha256(f"{self.train_text}\n{self.test_text}".encode("latin-1"))
        super().__init__(settings, digest.hexdigest()[:12])

    def reads(self, job: TaskJob) -> str:
        return "" if self.settings.known[job.task].haystack == "noise" else self.data

    def compared(self, job: TaskJob) -> dict[str, Any]:
        """Not for how many seeds it is run."""
        contender = super().compared(job)
        contender.pop("runs")
        if contender["short_window"] is None:
            contender.pop("short_window")
        return contender

    def run(self, job: TaskJob, progress: Progress | None) -> dict[str, Any]:
        contender = self.settings.contender(job.contender)
        return run(self.settings, contender, job.task, job.seed, self.train_text, self.test_text, progress, self.device)

    def result(self, row: dict[str, Any]) -> str:
        return " / ".join(f"{100 * found['answers']:.1f}" for found in row["accuracy"].values())

    def check(self, contenders: list[NeedleContender]) -> None:
        for contender in contenders:
            try:
                configuration(self.settings, contender)
            except (ValueError, TypeError) as error:
                raise ValueError(f"contender {contender.name!r}: {error}") from error


def _text(path: Path) -> str:
    """A book with its white space made single spaces: a line break marks the question alone."""
    return b" ".join(path.read_bytes().split()).decode("latin-1")


def configuration(settings: Needles, contender: NeedleContender) -> HopeConfig:
    """The contender with the experiment's number of parameters, within 2%, by the width of the MLPs."""
    options = {"mixer": contender.mixer, "mixer_options": contender.options}
    own: dict[str, Any] = {"mixers": contender.mixers} if contender.mixers else options

    def config(hidden: int) -> HopeConfig:
        return HopeConfig(
            **own, hidden_size=settings.width, num_attention_heads=max(1, settings.width // contender.head_size),
            num_hidden_layers=settings.layers, vocab_size=256, intermediate_size=hidden, tie_word_embeddings=False,
        )  # fmt: skip

    return fitted(settings.parameters, config, sizes.parameters, step=8)


def run(
    settings: Needles, contender: NeedleContender, name: str, seed: int, train_text: str, test_text: str,
    progress: Progress | None, device: str = "cpu",
) -> dict[str, Any]:  # fmt: skip
    """Train up to one length; accuracy by multiple of it, of whole answers and of their bytes."""
    task = settings.known[name]
    model, losses = learn(settings, contender, task, seed, train_text, progress, device)
    fresh = random.Random(10_000 + seed)
    found = {
        f"{times}x": accuracy(model, batch(task, fresh, settings.tested, times * settings.length, test_text))
        for times in settings.times
    }
    return {"parameters": size(model), "accuracy": found, "curve": curve(losses, 30)}


def learn(
    settings: Needles, contender: NeedleContender, task: Any, seed: int, text: str, progress: Progress | None,
    device: str = "cpu",
) -> tuple[HopeForCausalLM, list[float]]:  # fmt: skip
    """A contender trained on texts of one kind, up to one length, and the loss of each step."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = HopeForCausalLM(configuration(settings, contender)).to(device)
    lengths = [n for n in settings.shorter if n >= task.least] + [settings.length]

    def loss_of() -> Tensor:
        drawn = batch(task, rng, settings.batch_size, rng.choice(lengths), text)
        tokens, targets, answers = (t.to(device) for t in drawn)
        loss = F.cross_entropy(model(tokens).logits.transpose(1, 2), targets, reduction="none")
        return loss[answers > 0].mean() + settings.straw_weight * loss[answers == 0].mean()

    return model, train(
        model, settings.steps, settings.lr, settings.warmup, loss_of, progress,
        short_window=contender.short_window, seed=seed,
    )  # fmt: skip


@torch.no_grad()
def accuracy(model: nn.Module, drawn: tuple[Tensor, Tensor, Tensor]) -> dict[str, float]:
    """Share of answers of which every byte is named, each after the right ones before it, and of their bytes."""
    model.eval()
    tokens, targets, answers = beside(model, drawn)
    right = torch.cat([model(part).logits.argmax(-1) for part in tokens.split(8)]) == targets
    numbers = range(1, int(answers.max()) + 1)
    whole = torch.stack([(right | (answers != number)).all(-1) for number in numbers])
    return {"answers": whole.double().mean().item(), "bytes": right[answers > 0].double().mean().item()}
