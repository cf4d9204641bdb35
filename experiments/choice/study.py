"""A contender trained on one of three tasks: parity, recall of pairs, or text."""

from __future__ import annotations

import functools
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.choice import tasks
from experiments.demo.text import standard_library
from experiments.shared.models.drawn import beside, size, train
from experiments.shared.study import Contender, Study, StudyWork
from experiments.shared.work import Job, Progress, curve
from nestling.models import HopeForCausalLM, sizes
from nestling.models.hope import HopeConfig
from nestling.training.config import DataConfig, TrainConfig
from nestling.training.data import Corpus, load_corpus
from nestling.training.evaluation import evaluate
from nestling.training.loop import Trainer

Draw = Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]  # sequences, length or pairs


@dataclass
class ChoiceContender(Contender):
    """A sequence layer with its options, or a pattern of them; `runs`: the seeds of each task, {} is all of them.

    The width of the MLPs is set on text only, for equal parameters; `text_lr` replaces the experiment's.
    """

    mixer: str = "selfmod"
    options: dict[str, Any] = field(default_factory=dict)
    mixers: list[dict[str, Any]] = field(default_factory=list)
    head_size: int = 64
    text_lr: float | None = None
    runs: dict[str, list[int]] = field(default_factory=dict)


@dataclass
class Choice(Study):
    """The numbers of the three tasks; "text 400" is language with 400 steps, "parity 2000" parity with that many."""

    name: str = "choice"
    contenders: list[ChoiceContender] = field(default_factory=list)
    tasks: list[str] = field(default_factory=lambda: ["parity", "recall", "text 1000", "parity 2000", "recall 4000"])
    layers: int = 2
    # parity and recall: AdamW with warm-up and cosine
    width: int = 64
    lr: float = 3e-3
    warmup: int = 100
    batch_size: int = 32
    tested: int = 64  # sequences of each length
    parity_steps: int = 600
    parity_lengths: list[int] = field(default_factory=lambda: [3, 40])  # any between the two
    parity_tested: list[int] = field(default_factory=lambda: [40, 100, 250])
    parity_chunk: int = 16  # of memories: a chunk has to end in training
    recall_steps: int = 1200
    recall_keys: int = 64
    recall_pairs: list[int] = field(default_factory=lambda: [4, 8, 16])
    recall_tested: list[int] = field(default_factory=lambda: [8, 16, 32, 64])
    # text: the demo's set-up
    text_width: int = 128
    text_parameters: int = 490_000
    text_lr: float = 7e-3
    text_decay: float = 0.4
    seq_len: int = 256
    text_batch: int = 4
    windows: int = 128  # of the held-out text

    def smoke(self) -> Choice:
        few = [asdict(c) | {"head_size": 16, "runs": {}} for c in self.contenders]
        return self.changed(
            contenders=few, tasks=["parity", "recall", "text 3"], width=16, text_width=32, text_parameters=60_000,
            batch_size=4, tested=4, parity_steps=3, recall_steps=3, recall_pairs=[2, 4], recall_tested=[4],
            parity_tested=[12], seq_len=32, windows=4, text_batch=2, seeds=[0],
        )  # fmt: skip

    def decisive(self, job: ChoiceJob) -> dict[str, Any]:
        """The numbers of the job's own task."""
        kind = job.task.split()[0]
        drawn = ("width", "lr", "warmup", "batch_size", "tested")
        own = {"text": ("seq_len", "windows")}.get(kind, drawn)
        return {
            name: value for name, value in self.stored().items()
            if name in own or name == "layers" or name.startswith(f"{kind}_")
        }  # fmt: skip


@dataclass(frozen=True)
class ChoiceJob(Job):
    """One training run."""

    contender: str
    task: str
    seed: int
    kind: str = "run"

    @property
    def key(self) -> str:
        return f"{self.contender} {self.task} seed={self.seed}"


class ChoiceWork(StudyWork):
    anywhere = True

    def __init__(self, settings: Choice) -> None:
        super().__init__(settings, text().fingerprint)

    def reads(self, job: ChoiceJob) -> str:
        return self.data if job.task.startswith("text") else ""

    def compared(self, job: ChoiceJob) -> dict[str, Any]:
        """Not for how many seeds it is run; the text's rate on text only."""
        contender = super().compared(job)
        contender.pop("runs")
        if contender["text_lr"] is None or not job.task.startswith("text"):
            contender.pop("text_lr")
        return contender

    def run(self, job: ChoiceJob, progress: Progress | None) -> dict[str, Any]:
        contender = self.settings.contender(job.contender)
        kind, *steps = job.task.split()
        if kind == "text":
            return run_text(self.settings, contender, int(steps[0]), job.seed, progress, self.device)
        return run_drawn(self.settings, contender, job.task, job.seed, progress, self.device)

    def result(self, row: dict[str, Any]) -> str:
        if "bits_per_byte" in row:
            return f"{row['bits_per_byte']:.4f} bits per byte, {row['tokens_per_second']:,.0f} tokens/s"
        return " / ".join(f"{100 * a:.1f}" for a in row["accuracy"].values()) + f", {row['parameters']:,} parameters"

    def check(self, contenders: list[ChoiceContender]) -> None:
        for contender in contenders:
            try:
                small_config(self.settings, contender, "recall")
                text_config(self.settings, contender)
            except (ValueError, TypeError) as error:
                raise ValueError(f"contender {contender.name!r}: {error}") from error


def fields(contender: ChoiceContender, width: int, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """A contender as fields of a HopeConfig of that width; `changes` are to options of memories."""
    changed = {"num_attention_heads": max(1, width // contender.head_size), "hidden_size": width}

    def options(mixer: str, own: dict[str, Any]) -> dict[str, Any]:
        return own if mixer in ("attention", "window_attention") else own | (changes or {})

    if not contender.mixers:
        return changed | {"mixer": contender.mixer, "mixer_options": options(contender.mixer, contender.options)}
    return changed | {"mixers": [sized(options(entry["mixer"], entry), width) for entry in contender.mixers]}


def sized(entry: dict[str, Any], width: int) -> dict[str, Any]:
    """A layer of a pattern; where it has a `head_size` of its own, as many heads as that gives."""
    own = dict(entry)
    size = own.pop("head_size", None)
    return own if size is None else own | {"num_heads": max(1, width // size)}


def small_config(settings: Choice, contender: ChoiceContender, kind: str) -> HopeConfig:
    """Of parity and recall."""
    parity = kind == "parity"
    own = fields(contender, settings.width, {"chunk_size": settings.parity_chunk} if parity else None)
    return HopeConfig(
        **own, num_hidden_layers=settings.layers, vocab_size=2 if parity else 2 * settings.recall_keys,
        tie_word_embeddings=False,
    )  # fmt: skip


def text_config(settings: Choice, contender: ChoiceContender) -> HopeConfig:
    """With the experiment's number of parameters, within 2%, by the width of the MLPs."""
    own = fields(contender, settings.text_width) | {"num_hidden_layers": settings.layers, "vocab_size": 259}
    low, high = (sizes.parameters(HopeConfig(**own, intermediate_size=n)) for n in (8, 16))
    exact = 8 + 8 * (settings.text_parameters - low) / (high - low)
    config = HopeConfig(**own, intermediate_size=max(8, 8 * round(exact / 8)))
    found = sizes.parameters(config)
    if abs(found / settings.text_parameters - 1) > 0.02:
        raise ValueError(f"no width of the MLPs gives {settings.text_parameters:,} parameters; the next is {found:,}")
    return config


def run_drawn(
    settings: Choice, contender: ChoiceContender, task: str, seed: int, progress: Progress | None, device: str = "cpu"
) -> dict[str, Any]:
    """Parity or recall, with the experiment's steps or so many: accuracy by length or by pairs."""
    kind, *own = task.split()
    torch.manual_seed(seed)
    model = HopeForCausalLM(small_config(settings, contender, kind)).to(device)
    steps = int(own[0]) if own else getattr(settings, f"{kind}_steps")
    generator, lengths = torch.Generator().manual_seed(seed), random.Random(seed)
    draw: Draw = tasks.parity if kind == "parity" else functools.partial(_pairs, keys=settings.recall_keys)

    def loss_of() -> Tensor:
        number = (
            lengths.randint(*settings.parity_lengths) if kind == "parity" else lengths.choice(settings.recall_pairs)
        )
        tokens, targets = draw(settings.batch_size, number, generator)
        tokens, targets = tokens.to(device), targets.to(device)
        return F.cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten(), ignore_index=tasks.IGNORED)

    losses = train(model, steps, settings.lr, settings.warmup, loss_of, progress)
    fresh = torch.Generator().manual_seed(10_000 + seed)
    found = {str(n): accuracy(model, draw(settings.tested, n, fresh)) for n in getattr(settings, f"{kind}_tested")}
    return {"parameters": size(model), "accuracy": found, "curve": curve(losses, 30)}


def _pairs(count: int, number: int, generator: torch.Generator, keys: int) -> tuple[Tensor, Tensor]:
    return tasks.pairs(count, number, keys, generator)


@torch.no_grad()
def accuracy(model: nn.Module, drawn: tuple[Tensor, Tensor]) -> float:
    """Share of the targets that the model names."""
    model.eval()
    tokens, targets = beside(model, drawn)
    found = torch.cat([model(part).logits.argmax(-1) for part in tokens.split(16)])
    asked = targets != tasks.IGNORED
    return (found == targets)[asked].double().mean().item()


def run_text(
    settings: Choice, contender: ChoiceContender, steps: int, seed: int, progress: Progress | None, device: str = "cpu"
) -> dict[str, Any]:
    """Language: bits per byte of held-out text."""
    torch.manual_seed(seed)
    model = HopeForCausalLM(text_config(settings, contender))
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig.from_dict({
            "out": folder, "steps": steps, "seed": seed, "device": device,
            "data": {"seq_len": settings.seq_len, "batch_size": settings.text_batch},
            "optim": {"name": "muon", "lr": contender.text_lr or settings.text_lr},
            "schedule": {"name": "wsd", "decay": settings.text_decay},
        })  # fmt: skip
        trainer = Trainer(config, model=model, corpus=text())
        losses, seconds = [], []
        while trainer.step < steps:
            began = time.perf_counter()
            report = trainer.train_step()
            seconds.append(time.perf_counter() - began)
            losses.append(report.loss)
            if progress:
                progress(trainer.step, report.loss)
    held_out = evaluate(
        model, text().val, seq_len=settings.seq_len, batch_size=8, max_batches=-(-settings.windows // 8)
    )
    return {
        "parameters": size(model),
        "bits_per_byte": held_out.bits_per_byte,
        "loss_by_position": held_out.binned(8),
        "skipped": trainer.skipped,
        "curve": curve(losses, 40),
        "tokens_per_second": settings.seq_len * settings.text_batch / statistics.median(seconds),
    }


@functools.cache
def text() -> Corpus:
    """The demo's text: sources of the standard library, some modules held out whole."""
    found = standard_library()
    return load_corpus(DataConfig(text=found.train, val_text=found.held_out, tokenizer="bytes", seq_len=256))
