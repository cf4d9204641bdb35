"""A small ViT on Fashion-MNIST: AdamW, Muon, AdEMAMix, AdaMuon and M3, each at its own learning rate (NL Fig. 11)."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.shared.optimizers import comparison
from experiments.shared.optimizers.comparison import Comparison, ComparisonWork, Model
from experiments.shared.optimizers.comparison_report import plot, summarize, table
from experiments.shared.optimizers.contenders import M3, OptimizerContender, five
from experiments.shared.optimizers.images import Images, find_folder, load_images, synthetic
from experiments.shared.optimizers.vit import ViT

GROUP = "Optimisers (on data)"
QUESTION = "Is M3 better than AdamW and Muon on images (NL Fig. 11)?"

__all__ = ["defaults", "plan", "plot", "summarize", "table", "work"]

plan = comparison.plan


@dataclass
class Vision(Comparison):
    """Numbers of the images; `validation` of the training images are held out for the search."""

    name: str = "vision"
    images: int = 12_800  # to train on
    validation: int = 5_000
    quick: int = 1_000  # images of an evaluation on the way

    def smoke(self) -> Vision:
        small = {"options": {"width": 16, "layers": 1, "heads": 2}, "steps": 6, "trials": 2}
        models = [m | small for m in self.to_dict()["models"]]
        return self.changed(models=models, seeds=[0, 1], images=256, validation=64, quick=32, batch_size=8,
                            evaluations=2)  # fmt: skip


def defaults() -> Vision:
    """The experiment's settings."""
    contenders = [*five(), OptimizerContender("M3 without Nesterov", "m3", M3 | {"nesterov": False})]
    return Vision(contenders=contenders, models=[Model("vit", {"width": 64, "layers": 3, "heads": 4})])


class ImageTask:
    """Classification of images; the order of the batches comes from the seed, an epoch at a time."""

    worst = math.log(10)

    def __init__(self, settings: Vision, images: Images) -> None:
        self.settings = settings
        pixels, labels = images.train
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        held_out, rest = order[: settings.validation], order[settings.validation :][: settings.images]
        if len(rest) < settings.batch_size:
            raise ValueError(f"{len(labels)} images are too few for validation={settings.validation} and a batch")
        self.parts = {
            "train": (pixels[rest], labels[rest]),
            "validation": (pixels[held_out], labels[held_out]),
            "test": images.test,
        }
        self._order = functools.lru_cache(maxsize=1)(self._draw)

    def model(self, name: str) -> nn.Module:
        return ViT(**self.settings.model(name).options)

    def loss(self, model: nn.Module, step: int, seed: int) -> Tensor:
        pixels, labels = self.parts["train"]
        size = self.settings.batch_size
        epoch, place = divmod(step, len(labels) // size)
        chosen = self._order(seed, epoch)[place * size : (place + 1) * size]
        return F.cross_entropy(model(pixels[chosen]), labels[chosen])

    def _draw(self, seed: int, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        return torch.randperm(len(self.parts["train"][1]), generator=generator)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: str, quick: bool) -> dict[str, float]:
        pixels, labels = self.parts[part]
        if quick:
            pixels, labels = pixels[: self.settings.quick], labels[: self.settings.quick]
        logits = torch.cat([model(some) for some in pixels.split(500)])
        hits = (logits.argmax(1) == labels).float().mean()
        return {"loss": float(F.cross_entropy(logits, labels)), "accuracy": float(hits)}


class VisionWork(ComparisonWork):
    def __init__(self, settings: Vision, folder: str) -> None:
        self.folder = folder  # "" for synthetic images
        super().__init__(settings, self._images().fingerprint)

    def _images(self) -> Images:
        return load_images(self.folder) if self.folder else synthetic()

    def task(self) -> ImageTask:
        return ImageTask(self.settings, self._images())


def work(settings: Vision, data: str | Path | None, smoke: bool) -> VisionWork:
    """What trains; a smoke run without `data` draws its images."""
    return VisionWork(settings, "" if smoke and data is None else str(find_folder(data)))
