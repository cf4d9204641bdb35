"""A contender trained on the short words of one language, and tested on short and long ones."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.languages.words import IGNORED, LANGUAGES, Language, batch
from experiments.shared.models.drawn import beside, fitted, size, train
from experiments.shared.study import Contender, Study, StudyWork
from experiments.shared.work import Job, Progress, curve
from nestling.models import HopeForCausalLM, sizes
from nestling.models.hope import HopeConfig


@dataclass
class LanguageContender(Contender):
    """A sequence layer with its options, or a pattern of them, or "lstm"; `runs`: its seeds, all if it is empty.

    steps: of training; None: the experiment's.
    short_window: attention sees no more tokens in half of the first three quarters of the steps (`nestling train`'s
        schedule.short_window); None: as many as the model says.
    """

    mixer: str = "selfmod"
    options: dict[str, Any] = field(default_factory=dict)
    mixers: list[dict[str, Any]] = field(default_factory=list)
    head_size: int = 64
    runs: list[int] = field(default_factory=list)
    steps: int | None = None
    short_window: int | None = None


@dataclass
class Languages(Study):
    """The numbers of the six languages."""

    name: str = "languages"
    contenders: list[LanguageContender] = field(default_factory=list)
    languages: list[str] = field(default_factory=lambda: list(LANGUAGES))
    layers: int = 2
    width: int = 64
    parameters: int = 125_000
    lr: float = 3e-3
    warmup: int = 100
    steps: int = 600
    batch_size: int = 32
    bins: dict[str, list[int]] = field(default_factory=lambda: {"2-50": [2, 50], "52-100": [52, 100]})  # trained: first
    tested: int = 200  # words of a bin

    def smoke(self) -> Languages:
        few = [asdict(c) | {"head_size": 8, "runs": [], "steps": None} for c in self.contenders]
        return self.changed(
            contenders=few, languages=["parity", "a^n b^n"], width=16, parameters=40_000, batch_size=4, tested=6,
            steps=3, bins={"2-12": [2, 12], "14-20": [14, 20]}, seeds=[0],
        )  # fmt: skip

    def decisive(self, job: LanguageJob) -> dict[str, Any]:
        """All but which languages there are."""
        values = super().decisive(job)
        values.pop("languages")
        return values


@dataclass(frozen=True)
class LanguageJob(Job):
    """One training run."""

    contender: str
    language: str
    seed: int
    kind: str = "run"

    @property
    def key(self) -> str:
        return f"{self.contender}, {self.language}, seed {self.seed}"


class LanguagesWork(StudyWork):
    anywhere = True

    def run(self, job: LanguageJob, progress: Progress | None) -> dict[str, Any]:
        contender = self.settings.contender(job.contender)
        return run(self.settings, contender, job.language, job.seed, progress, self.device)

    def compared(self, job: LanguageJob) -> dict[str, Any]:
        """Not for how many seeds it is run."""
        contender = super().compared(job) | {"runs": []}
        return {k: v for k, v in contender.items() if v is not None or k not in ("steps", "short_window")}

    def result(self, row: dict[str, Any]) -> str:
        return " / ".join(f"{100 * found['words']:.1f}" for found in row["accuracy"].values())

    def check(self, contenders: list[LanguageContender]) -> None:
        for contender in contenders:
            try:
                build(self.settings, contender, 4)
            except (ValueError, TypeError) as error:
                raise ValueError(f"contender {contender.name!r}: {error}") from error


class Lstm(nn.Module):
    """The recurrent network that Table 5 compares with: embedding, LSTM, a linear read-out."""

    def __init__(self, classes: int, width: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, width)
        self.lstm = nn.LSTM(width, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores [B, T, classes] for tokens [B, T]."""
        return self.head(self.lstm(self.embedding(tokens))[0])


def build(settings: Languages, contender: LanguageContender, classes: int) -> nn.Module:
    """The contender as a module from tokens to scores, its parameters within 2% of the experiment's number."""
    width, layers = settings.width, settings.layers
    if contender.mixer == "lstm":
        return fitted(settings.parameters, lambda hidden: Lstm(classes, width, hidden, layers), size, step=1)
    options = {"mixer": contender.mixer, "mixer_options": contender.options}
    own: dict[str, Any] = {"mixers": contender.mixers} if contender.mixers else options

    def config(hidden: int) -> HopeConfig:
        heads = max(1, width // contender.head_size)
        return HopeConfig(
            **own, hidden_size=width, num_attention_heads=heads, num_hidden_layers=layers, vocab_size=classes,
            intermediate_size=hidden, tie_word_embeddings=False,
        )  # fmt: skip

    return Scores(HopeForCausalLM(fitted(settings.parameters, config, sizes.parameters, step=8)))


class Scores(nn.Module):
    """A language model whose logits are scores of their own, not of a softmax."""

    def __init__(self, model: HopeForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens).logits


def run(
    settings: Languages, contender: LanguageContender, name: str, seed: int, progress: Progress | None,
    device: str = "cpu",
) -> dict[str, Any]:  # fmt: skip
    """Train on words of the first bin; accuracy by bin, of whole words and of single letters."""
    torch.manual_seed(seed)
    language, rng = LANGUAGES[name], random.Random(seed)
    model = build(settings, contender, len(language.letters) + 1).to(device)
    trained = next(iter(settings.bins.values()))

    def loss_of() -> Tensor:
        tokens, targets = batch(language, [language.draw(rng, *trained) for _ in range(settings.batch_size)])
        tokens, targets = tokens.to(device), targets.to(device)
        told = targets != IGNORED
        return F.binary_cross_entropy_with_logits(model(tokens)[told], targets[told])

    losses = train(
        model, contender.steps or settings.steps, settings.lr, settings.warmup, loss_of, progress,
        short_window=contender.short_window, seed=seed,
    )  # fmt: skip
    found = {
        bin_: accuracy(model, words(language, 10_000 + seed, settings.tested, *span))
        for bin_, span in settings.bins.items()
    }
    return {"parameters": size(model), "accuracy": found, "curve": curve(losses, 30)}


def words(language: Language, seed: int, count: int, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Words to test with, each once: of a language with one word a length there are as many as lengths."""
    rng = random.Random(seed)
    return batch(language, sorted({language.draw(rng, low, high) for _ in range(count)}))


@torch.no_grad()
def accuracy(model: nn.Module, drawn: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Share of words with every set right, and of letters whose set is right."""
    model.eval()
    tokens, targets = beside(model, drawn)
    scores = torch.cat([model(part) for part in tokens.split(50)])
    told = (targets != IGNORED).all(-1)
    right = ((scores > 0) == (targets > 0.5)).all(-1)
    return {"words": (right | ~told).all(-1).double().mean().item(), "letters": right[told].double().mean().item()}
