"""Contenders trained on tasks that are drawn: tokens, and targets where something is asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.shared.models.drawn import beside, fitted, size, train
from experiments.shared.study import Contender, Study, StudyWork
from experiments.shared.work import Job, Progress, Row, curve
from nestling.models import HopeForCausalLM, sizes
from nestling.models.hope import HopeConfig

IGNORED = -100
Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Task:
    """`draw(count, generator)`: tokens [count, T] below `classes`, targets [count, T], -100 where nothing is asked.

    Attributes:
        tests: by label, what is drawn to test with.
        batch_size: sequences of a step.
        compressed: the targets are named by the output at the last token alone, see `Compressor`.
    """

    classes: int
    draw: Draw
    tests: Mapping[str, Draw]
    batch_size: int = 32
    compressed: bool = False


@dataclass
class TaskContender(Contender):
    """A sequence layer with its options, or a pattern of them.

    layers: decoder layers, steps: of training; None: the experiment's. runs: its seeds, all if it is empty.
    """

    mixer: str = "selfmod"
    options: dict[str, Any] = field(default_factory=dict)
    mixers: list[dict[str, Any]] = field(default_factory=list)
    head_size: int = 64
    layers: int | None = None
    steps: int | None = None
    runs: list[int] = field(default_factory=list)


@dataclass
class TaskStudy(Study):
    """The numbers of all tasks; a kind of it has a name and its tasks in `known`."""

    known: ClassVar[Mapping[str, Task]] = {}
    contenders: list[TaskContender] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    layers: int = 2
    width: int = 64
    parameters: int = 125_000
    lr: float = 3e-3
    warmup: int = 100
    steps: int = 1000
    tested: int = 256  # sequences of each test

    def smoke(self) -> TaskStudy:
        few = [asdict(c) | {"head_size": 8, "steps": None, "runs": []} for c in self.contenders]
        return self.changed(contenders=few, width=16, parameters=40_000, tested=4, steps=2, seeds=[0])

    def decisive(self, job: TaskJob) -> dict[str, Any]:
        """All but which tasks there are."""
        values = super().decisive(job)
        values.pop("tasks")
        return values


@dataclass(frozen=True)
class TaskJob(Job):
    """One training run."""

    contender: str
    task: str
    seed: int
    kind: str = "run"

    @property
    def key(self) -> str:
        return f"{self.contender}, {self.task}, seed {self.seed}"


class TaskWork(StudyWork):
    settings: TaskStudy
    anywhere = True

    def compared(self, job: TaskJob) -> dict[str, Any]:
        """Not for how many seeds it is run."""
        contender = super().compared(job)
        contender.pop("runs")
        if contender["steps"] is None:
            contender.pop("steps")
        return contender

    def run(self, job: TaskJob, progress: Progress | None) -> dict[str, Any]:
        settings = self.settings
        contender, task = settings.contender(job.contender), settings.known[job.task]
        return run(settings, contender, task, job.seed, progress, self.device)

    def result(self, row: dict[str, Any]) -> str:
        return " / ".join(f"{100 * found:.1f}" for found in row["accuracy"].values())

    def check(self, contenders: list[TaskContender]) -> None:
        for contender in contenders:
            try:
                configuration(self.settings, contender, 16)
            except (ValueError, TypeError) as error:
                raise ValueError(f"contender {contender.name!r}: {error}") from error


def plan(settings: TaskStudy, contenders: list[TaskContender], row: Row) -> list[TaskJob]:
    """Every task and contender with the first seed, then with the second, ..."""
    return [
        TaskJob(contender.name, task, seed)
        for seed in settings.seeds
        for task in settings.tasks
        for contender in contenders
        if not contender.runs or seed in contender.runs
    ]


def configuration(settings: TaskStudy, contender: TaskContender, classes: int) -> HopeConfig:
    """The contender with the experiment's number of parameters, within 2%, by the width of the MLPs.

    Embedding and output matrix are not counted among them: they are everybody's, and the tasks' own.
    """
    options = {"mixer": contender.mixer, "mixer_options": contender.options}
    own: dict[str, Any] = {"mixers": contender.mixers} if contender.mixers else options

    def config(hidden: int) -> HopeConfig:
        return HopeConfig(
            **own, hidden_size=settings.width, num_attention_heads=max(1, settings.width // contender.head_size),
            num_hidden_layers=contender.layers or settings.layers, vocab_size=classes, intermediate_size=hidden,
            tie_word_embeddings=False,
        )  # fmt: skip

    around = 2 * classes * settings.width
    return fitted(settings.parameters + around, config, sizes.parameters, step=8)


class Compressor(nn.Module):
    """An autoencoder of MAD's kind: every token is named from the output at the last one and from its place.

    Args:
        model: what reads.
        length: tokens of a sequence.
    """

    def __init__(self, model: HopeForCausalLM, length: int) -> None:
        super().__init__()
        width = model.config.hidden_size
        self.reader = model.model
        self.places = nn.Parameter(torch.randn(length, width))
        self.decoder = nn.Sequential(
            nn.RMSNorm(width), nn.Linear(width, width), nn.GELU(), nn.RMSNorm(width), nn.Linear(width, width),
            nn.GELU(), nn.RMSNorm(width), nn.Linear(width, model.config.vocab_size),
        )  # fmt: skip

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, classes] for tokens [B, T]."""
        return self.decoder(self.reader(tokens).last_hidden_state[:, -1:] + self.places)


class Logits(nn.Module):
    """A language model that gives its logits [B, T, classes] alone."""

    def __init__(self, model: HopeForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens).logits


def run(
    settings: TaskStudy, contender: TaskContender, task: Task, seed: int, progress: Progress | None, device: str = "cpu"
) -> dict[str, Any]:
    """Train on what is drawn anew in each step; the share of right answers in each test."""
    model, losses = trained(settings, contender, task, seed, progress, device)
    return {"parameters": size(model), "accuracy": tested(settings, model, task, seed), "curve": curve(losses, 30)}


def trained(
    settings: TaskStudy, contender: TaskContender, task: Task, seed: int, progress: Progress | None, device: str = "cpu"
) -> tuple[nn.Module, list[float]]:
    """What was trained, tokens [B, T] to logits [B, T, classes], and the loss of each step."""
    torch.manual_seed(seed)
    read = HopeForCausalLM(configuration(settings, contender, task.classes))
    generator = torch.Generator().manual_seed(seed)
    length = task.draw(1, torch.Generator())[0].shape[1]
    model = (Compressor(read, length) if task.compressed else Logits(read)).to(device)

    def loss_of() -> Tensor:
        tokens, targets = (t.to(device) for t in task.draw(task.batch_size, generator))
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)

    return model, train(model, contender.steps or settings.steps, settings.lr, settings.warmup, loss_of, progress)


def tested(settings: TaskStudy, model: nn.Module, task: Task, seed: int) -> dict[str, float]:
    """The share of right answers in each test."""
    fresh = torch.Generator().manual_seed(10_000 + seed)
    return {label: accuracy(model, draw(settings.tested, fresh)) for label, draw in task.tests.items()}


@torch.no_grad()
def accuracy(model: nn.Module, drawn: tuple[Tensor, Tensor]) -> float:
    """Share of the targets that the model names."""
    model.eval()
    tokens, targets = beside(model, drawn)
    found = torch.cat([model(part).argmax(-1) for part in tokens.split(32)])
    return (found == targets)[targets != IGNORED].double().mean().item()
