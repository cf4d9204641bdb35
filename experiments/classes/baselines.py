"""Ways to learn classes from a stream of labelled texts: levels, in-context learning, fine-tuning and its remedies,
probes of frozen features."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.classes.constrain import classify, prior
from experiments.classes.intents import Example
from experiments.classes.learner import ClassLearner, Setup
from experiments.classes.probes import ClassMeans, Exact, LinearProbe
from experiments.shared.continual.streams import adapted, finetune, learner, pieces, prefilled, read, score, trained
from experiments.shared.continual.study import LearnerContender
from nestling.cms.fast_linear import applied
from nestling.optim import M3


class Speller(ClassLearner):
    """A language model that spells the name of the class.

    Options: choice (examples that stand before every text, as many as the window holds: the "latest", or "balanced",
    as many of each class as of the others; without it none do), buffer (tokens of examples that are kept).
    """

    def __init__(self, setup: Setup, contender: LearnerContender) -> None:
        super().__init__(setup, contender)
        self.model = learner(setup.model, contender)
        self.seen: list[Example] = []
        self.kept: list[list[int]] = []

    def context(self) -> list[int]:
        """What stands before every text."""
        if "choice" not in self.options:
            return []
        order = _balanced(self.seen, self.draw) if self.options["choice"] == "balanced" else self.seen[::-1]
        chosen, size = [], 0
        for example in order:
            ids = self.setup.form.example(example.text, example.label)
            if size + len(ids) > self.setup.window - 64:  # room for the text
                break
            chosen.append(ids)
            size += len(ids)
        return [token for ids in chosen[::-1] for token in ids]

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Inside, the model is as it has become."""
        with adapted(self.model, None):
            yield

    def learn(self, group: Sequence[Example]) -> None:
        """Without learning there is nothing to do but to keep what may stand in the context."""
        self.seen += group

    def answer(self, texts: Sequence[str], classes: Sequence[int]) -> dict[str, list[int]]:
        form, trie = self.setup.form, self.setup.form.trie(classes)
        with torch.no_grad(), self.ready():
            context = prefilled(self.model, self.context())
            given = prior(self.model, form, trie, context, self._batch)
            prompts = [form.prompt(t) for t in texts]
            found = classify(self.model, prompts, trie, (None, given), context, self._batch)
        return dict(zip(("plain", "calibrated"), found))

    def _keep(self) -> None:
        """What the buffer holds: examples of all classes so far, as many of each as of the others."""
        self.kept, size = [], 0
        for example in _balanced(self.seen, self.draw):
            ids = self.setup.form.example(example.text, example.label)
            if (size := size + len(ids)) > self.options["buffer"]:
                break
            self.kept.append(ids)

    @property
    def _batch(self) -> int:
        # with a context every row holds the whole of it
        return max(1, self.setup.batch // 4) if "choice" in self.options else self.setup.batch


class Levels(Speller):
    """Levels learn while the stream is read; at a test it is out of the context, but for the examples of a `choice`.

    Options: replay (tokens of kept examples, of all classes alike, that are read again after a group for each token of
    it, as `nestling learn --sleep` does), snapshots (what was known after each group is kept, and every text is
    answered by the one that predicts it best).
    """

    def __init__(self, setup: Setup, contender: LearnerContender) -> None:
        super().__init__(setup, contender)
        self.cache: Any = None
        engine = self.model.learner
        self.parameters = sum(m.weight.numel() for i in engine.fast for m in engine.modules[i])
        self.share = 1 - engine.first / engine.backbone.blocks
        self.snapshots: list[Any] = []

    @contextmanager
    def ready(self) -> Iterator[None]:
        with adapted(self.model, self.cache):
            yield

    def learn(self, group: Sequence[Example]) -> None:
        super().learn(group)
        ids = self.tokens(group)
        self._read(ids)
        if wanted := round(self.options.get("replay", 0) * len(ids)):
            self._keep()
            again: list[int] = []
            while len(again) < wanted:
                again += [token for kept in self.draw.sample(self.kept, len(self.kept)) for token in kept]
            self._read(again[:wanted])
        if self.options.get("snapshots"):
            self.snapshots.append(self.cache.fork())

    def answer(self, texts: Sequence[str], classes: Sequence[int]) -> dict[str, list[int]]:
        if not self.snapshots:
            return super().answer(texts, classes)
        prompts, now = [self.setup.form.encode(t) for t in texts], self.cache
        losses = []
        for snapshot in self.snapshots:
            with adapted(self.model, snapshot):
                losses.append(score(self.model, [p[:1] for p in prompts], [p[1:] for p in prompts]))
        best = torch.tensor(losses).argmin(0).tolist()
        found: dict[str, list[int]] = {}
        for n in sorted(set(best)):
            self.cache, mine = self.snapshots[n], [i for i, b in enumerate(best) if b == n]
            for variant, given in super().answer([texts[i] for i in mine], classes).items():
                row = found.setdefault(variant, [0] * len(texts))
                for i, answer in zip(mine, given, strict=True):
                    row[i] = answer
        self.cache = now
        return found

    def _read(self, ids: list[int]) -> None:
        if self.contender.levels:
            _, self.cache = read(self.model, torch.tensor([ids]), self.cache)
        else:  # a model with levels of its own: its attention begins anew after every window
            for part in pieces(torch.tensor([ids]), self.setup.window):
                self.cache = self.model(part, past_key_values=self.cache, use_cache=True).past_key_values
                self.cache.forget_context()
        self.forwards += len(ids)
        self.backwards += self.share * len(ids)


class FineTuned(Speller):
    """AdamW (or M3) on the weights that the contender's levels would own, or on all; EWC and replay by their options.

    Options: own (the weights of the model's own levels), lr, optimizer ("m3", as a level's), size (tokens of a step),
    ewc (strength), fisher (examples of a group it is estimated from), replay (replayed tokens for each new one), buffer
    (tokens kept).
    """

    def __init__(self, setup: Setup, contender: LearnerContender) -> None:
        super().__init__(setup, contender)
        self.modules, self.share = [], 1.0
        if contender.levels or self.options.get("own"):
            engine = self.model.learner
            chosen = range(len(engine.levels)) if contender.levels else engine.fast
            self.modules = [m for i in chosen for m in engine.modules[i]]
            self.share = 1 - engine.first / engine.backbone.blocks
            self.tuned = [torch.zeros(1, *m.weight.shape, requires_grad=True) for m in self.modules]
        else:
            self.tuned = list(self.model.parameters())
        self.parameters = sum(p.numel() for p in self.tuned)
        self.optimizer, self.fisher, self.anchor = None, None, None
        if self.options.get("optimizer") == "m3":
            self.optimizer = M3(self.tuned, self.options["lr"], betas=(0.9, 0.999, 0.9), second_moment="gradient")

    @contextmanager
    def ready(self) -> Iterator[None]:
        with applied(self.modules, self.tuned if self.modules else []), adapted(self.model, None):
            yield

    def learn(self, group: Sequence[Example]) -> None:
        o, ids = self.options, self.tokens(group)
        with applied(self.modules, self.tuned if self.modules else []):
            _, self.optimizer = finetune(
                self.model, pieces(torch.tensor([ids]), o["size"]), o["lr"], self.tuned,
                penalty=self._pull if self.fisher else None, replay=self._replay if "replay" in o else None,
                optimizer=self.optimizer,
            )  # fmt: skip
            self._cost(len(ids))
            if "ewc" in o:
                self._consolidate(group)
        super().learn(group)
        if "replay" in o:
            self._keep()

    def _cost(self, tokens: int) -> None:
        self.forwards += tokens
        self.backwards += self.share * tokens

    def _consolidate(self, group: Sequence[Example]) -> None:
        """Add the diagonal Fisher information of a group's examples, at the weights as it left them."""
        count = min(self.options["fisher"], len(group))
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in self.tuned]
        with trained(self.model, self.tuned), torch.enable_grad():
            for example in self.draw.sample(list(group), count):
                ids = torch.tensor([self.setup.form.example(example.text, example.label)])
                logits = self.model(ids[:, :-1], use_cache=False).logits
                loss = F.cross_entropy(logits[0].float(), ids[0, 1:], reduction="sum")
                for total, g in zip(sums, torch.autograd.grad(loss, self.tuned), strict=True):
                    total.addcmul_(g.float(), g.float(), value=1 / count)
                self._cost(ids.shape[1])
        self.fisher = sums if self.fisher is None else [a + b for a, b in zip(self.fisher, sums, strict=True)]
        self.anchor = [p.detach().clone() for p in self._masters()]

    def _masters(self) -> list[Tensor]:
        return [p for g in self.optimizer.param_groups for p in g["params"]]

    def _pull(self, weights: list[Tensor]) -> list[Tensor]:
        """The gradient of ewc/2 F (w - anchor)^2."""
        parts = zip(self.fisher, weights, self.anchor, strict=True)
        return [self.options["ewc"] * f * (w - a) for f, w, a in parts]

    def _replay(self, batch: Tensor) -> Tensor | None:
        wanted = round(self.options["replay"] * (batch.shape[1] - 1))
        if not self.kept or wanted < 1:
            return None
        ids: list[int] = []
        while len(ids) <= wanted:
            ids += self.draw.choice(self.kept)
        self._cost(wanted)
        return torch.tensor([ids[: wanted + 1]])


def _balanced(seen: Sequence[Example], draw: random.Random) -> list[Example]:
    """All examples in random order, but one of each class before a second of any."""
    by_class: dict[int, list[Example]] = {}
    for example in draw.sample(list(seen), len(seen)):
        by_class.setdefault(example.label, []).append(example)
    rounds = max((len(v) for v in by_class.values()), default=0)
    return [e for n in range(rounds) for e in draw.sample([v[n] for v in by_class.values() if len(v) > n],
                                                          sum(len(v) > n for v in by_class.values()))]  # fmt: skip


METHODS: dict[str, type[ClassLearner]] = {
    "levels": Levels,
    "zero-shot": Speller,
    "in-context": Speller,
    "finetune": FineTuned,
    "exact": Exact,
    "probe": LinearProbe,
    "class means": ClassMeans,
}
