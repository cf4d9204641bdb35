"""The same optimisers on small language models of bytes: a Transformer, and Hope (NL Sec. 7.2)."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from experiments.shared.corpus import Texts, find_files, load_texts
from experiments.shared.optimizers import comparison
from experiments.shared.optimizers.comparison import Comparison, ComparisonWork, Model
from experiments.shared.optimizers.comparison_report import plot, summarize, table
from experiments.shared.optimizers.contenders import five
from nestling.training.batches import Batches
from nestling.training.config import DataConfig
from nestling.training.evaluation import evaluate, token_losses

GROUP = "Optimisers (on data)"
QUESTION = "Is M3 better than AdamW and Muon on language, with a Transformer and with Hope?"

__all__ = ["defaults", "plan", "plot", "summarize", "table", "work"]

plan = comparison.plan


@dataclass
class Language(Comparison):
    """Numbers of the text; `test_text` is held out whole, the tails of the other files are for the search."""

    name: str = "language"
    batch_size: int = 4
    seq_len: int = 128
    val_fraction: float = 0.05
    test_text: str = "herman-melville--moby-dick.txt"
    windows: int = 192  # of an evaluation
    quick: int = 32  # of one on the way
    shape: dict[str, Any] = field(default_factory=lambda: {"hidden_size": 64, "num_hidden_layers": 2,
                                                           "num_attention_heads": 4})  # fmt: skip

    def smoke(self) -> Language:
        models = [m | {"steps": 4, "trials": 2} for m in self.to_dict()["models"]]
        shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        return self.changed(models=models, seeds=[0, 1], shape=shape, seq_len=24, batch_size=2, windows=4, quick=2,
                            test_text="", val_fraction=0.02, evaluations=2)  # fmt: skip


def defaults() -> Language:
    """The experiment's settings."""
    some = ["AdamW", "Muon", "M3"]
    models = [
        Model("transformer", {"mixer": "attention"}, trials=4, steps=200),
        Model("hope", {"mixer": "selfmod"}, some, trials=5, steps=100, equal_time=False),
    ]
    return Language(contenders=five(), models=models)


class TextTask:
    """Next-byte prediction in nats; a window's order comes from the seed."""

    worst = math.log(256)

    def __init__(self, settings: Language, texts: Texts) -> None:
        self.settings = settings
        self.parts = {"train": texts.corpus.train, "validation": texts.corpus.val, "test": texts.test}
        self.vocabulary = len(texts.corpus.tokenizer)
        self._batches = functools.lru_cache(maxsize=2)(
            lambda seed: Batches(self.parts["train"], settings.seq_len, settings.batch_size, seed)
        )

    def model(self, name: str) -> nn.Module:
        from nestling.models import HopeForCausalLM, sizes

        options = self.settings.shape | self.settings.model(name).options
        return HopeForCausalLM(sizes.config("tiny", vocab_size=self.vocabulary, **options))

    def loss(self, model: nn.Module, step: int, seed: int) -> Tensor:
        return token_losses(model, self._batches(seed)[step]).mean()

    def evaluate(self, model: nn.Module, part: str, quick: bool) -> dict[str, float]:
        settings, size = self.settings, 8
        number = settings.quick if quick else settings.windows
        found = evaluate(
            model, self.parts[part], seq_len=settings.seq_len, batch_size=size, max_batches=-(-number // size)
        )
        return {"loss": found.loss}


class LanguageWork(ComparisonWork):
    def __init__(self, settings: Language, files: list[Path]) -> None:
        self.files = files
        super().__init__(settings, self._texts(settings).fingerprint)

    def _texts(self, settings: Language) -> Texts:
        data = DataConfig(seq_len=settings.seq_len, val_fraction=settings.val_fraction)
        return load_texts(self.files, settings.test_text, data)

    def task(self) -> TextTask:
        return TextTask(self.settings, self._texts(self.settings))


def work(settings: Language, data: str | Path | None, smoke: bool) -> LanguageWork:
    """What trains, on the text files of `data`."""
    return LanguageWork(settings, find_files(data, smoke))
