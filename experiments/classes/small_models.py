"""Small models of ours for the experiment with classes: Hope over bytes, trained on texts of another data set."""

from __future__ import annotations

import functools
import hashlib
import json
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from experiments.classes import intents
from nestling.models.hope import HopeConfig, HopeForCausalLM
from nestling.utils.files import new_folder
from nestling.utils.quiet import no_bars

OURS = ("ours", "ours, plain")  # with levels that learn in the context, and as many weights without
FOLDER = Path("runs/classes-models")


@dataclass(frozen=True)
class Pretraining:
    """The model, and how it is trained on streams of labelled texts before it meets the classes of the experiment."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    inner: int = 256  # hidden width of the MLP of a level
    mixer: str = "attention"
    levels: list[dict[str, Any]] = field(default_factory=lambda: [{"chunk_size": 64, "lr": 0.1}])
    meta_grad: str = "first_order"
    steps: int = 250
    length: int = 512
    batch: int = 8
    classes: int = 12  # classes of one stream: so that its beginning helps with its end
    lr: float = 2e-3
    warm: float = 0.05  # part of the steps in which the learning rate rises
    seed: int = 0


class Bytes:
    """Text to the values of its bytes."""

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


def ours(name: str, texts: list[tuple[str, str]], options: dict[str, Any]) -> tuple[HopeForCausalLM, Bytes]:
    """One of `OURS`, trained on the data sets (name, folder), or as an earlier run left it in `FOLDER`."""
    return _ours(name, json.dumps(texts), json.dumps(options, sort_keys=True)), Bytes()


@functools.lru_cache(maxsize=4)
def _ours(name: str, texts: str, options: str) -> HopeForCausalLM:
    setup = Pretraining(**json.loads(options))
    known = [intents.load(folder, name) for name, folder in json.loads(texts)]
    made = json.dumps([name, asdict(setup), [d.fingerprint for d in known]], sort_keys=True)
    folder = FOLDER / hashlib.sha256(made.encode()).hexdigest()[:12]
    if not folder.exists():
        model = train(build(name, setup), known, setup)
        try:
            with new_folder(folder) as aside, no_bars():
                model.save_pretrained(aside)
        except OSError:  # another process was faster
            pass
    with no_bars():
        return HopeForCausalLM.from_pretrained(folder).eval().requires_grad_(False)


def build(name: str, setup: Pretraining) -> HopeForCausalLM:
    """The untrained model: levels of equal width, or one MLP as wide as they are together."""
    torch.manual_seed(setup.seed)
    fast = name == OURS[0]
    return HopeForCausalLM(HopeConfig(
        hidden_size=setup.hidden, num_hidden_layers=setup.layers, num_attention_heads=setup.heads, mixer=setup.mixer,
        intermediate_size=setup.inner if fast else setup.inner * (len(setup.levels) + 1),
        cms_levels=[*setup.levels, {"chunk_size": None}] if fast else None,
        cms_meta_grad=setup.meta_grad, context_length=1 << 20,
    ))  # fmt: skip


def train(model: HopeForCausalLM, known: list[intents.Intents], setup: Pretraining) -> HopeForCausalLM:
    """Next-token training on streams of a few classes each, levels learning along."""
    draw = random.Random(setup.seed)
    pairs = [(d, c) for d in known for c in range(len(d.labels))]

    def stream() -> list[int]:
        chosen, ids = draw.sample(pairs, min(setup.classes, len(pairs))), []
        while len(ids) <= setup.length:
            d, c = draw.choice(chosen)
            ids += f"{draw.choice(d.train[c])}\nintent: {d.labels[c]}\n".encode()
        return ids[: setup.length]

    optimizer = torch.optim.AdamW(model.parameters(), setup.lr, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    rise = max(1, round(setup.warm * setup.steps))
    model.train()
    with torch.enable_grad():
        for step in range(setup.steps):
            rate = min((step + 1) / rise, (setup.steps - step) / (setup.steps - rise + 1))
            for group in optimizer.param_groups:
                group["lr"] = setup.lr * rate
            ids = torch.tensor([stream() for _ in range(setup.batch)])
            model(ids, labels=ids).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return model
