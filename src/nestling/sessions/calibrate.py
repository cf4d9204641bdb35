"""The default rule refined for one model: a few rates and a larger rank, tried on passages of given texts.

Of each passage the first part is read and what follows it scored, in a fresh context. A rule counts by what it gains
there, if the harm it does to texts of the model's own making is small beside it. The last passage chooses nothing:
it says whether the rule that the others chose is ahead of the default on what it was not chosen on.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nestling.cms.cache import LevelsCache
from nestling.schedule import Level
from nestling.sessions.check import PIECES, own_texts
from nestling.sessions.documents import Text
from nestling.sessions.scores import score
from nestling.sessions.settings import choose_context
from nestling.training.tokenizers import encode
from nestling.utils.files import write_text

PASSAGES = 4  # the last of them chooses nothing
READ, AFTER = 512, 256  # tokens of a passage that are read, and that follow
LEAST = 96  # tokens that a passage must have
SLICE = 1 << 14  # bytes that surely hold a passage
# bits per byte by which a rule may raise the model's own texts: this, or the default's own harm where it is more, or
# this share of what the rule gains
HARM, WORTH = 0.01, 1 / 8
MOST = 5  # rules that are tried at most, the default among them


@dataclass(frozen=True)
class Tried:
    """A rule that was tried.

    Attributes:
        lr, rank: of the level.  state_bytes: of one stream.
        gain: bits per byte on what follows a passage that was read, below the model without levels; the mean.
        harm: bits per byte on the model's own texts, above it; the mean over passages.  harms: too much to be chosen.
        seconds: of this try.
    """

    lr: float
    rank: int | None
    state_bytes: int
    gain: float
    harm: float
    harms: bool
    seconds: float


def passages(texts: list[Text], tokenizer: Any, count: int = PASSAGES) -> list[list[int]]:
    """Ids of passages at equal distances in all texts together; shorter ones than READ + AFTER where texts are short.

    Raises:
        ValueError: a pipe, or too little text.
    """
    if any(text.path is None for text in texts):
        raise ValueError("calibrating reads its texts more than once, which a pipe cannot be: give files or folders")
    total, found = sum(text.size for text in texts), []
    for n in range(count):
        at, end = n * total // count, (n + 1) * total // count
        part = _between(texts, at, min(end, at + SLICE)).decode("utf-8", "ignore")
        part = part[part.find(" ") + 1 :] if at else part  # not from the middle of a word
        found.append(encode(tokenizer, part)[: READ + AFTER])
    if min(map(len, found)) < LEAST:
        raise ValueError(
            f"the texts are too short to calibrate on: each of {count} equal parts must have at least {LEAST} tokens, "
            f"and the shortest has {min(map(len, found))}; give more text, or leave the default rule"
        )
    return found


def _between(texts: list[Text], start: int, end: int) -> bytes:
    """Bytes [start, end) of all texts as if they were one, a blank line between two of them."""
    found, at = [], 0
    for text in texts:
        a, b = max(start, at), min(end, at + text.size)
        if a < b:
            with text.opened(text.path) as file:
                file.seek(a - at)
                found.append(file.read(b - a))
        at += text.size
    return b"\n\n".join(found)


class Trials:
    """Tries rules on a model with one level; each is kept in a file, so that a search that was stopped goes on.

    Args:
        model: with the default level, of which nothing else changes.
        journal: the file, for this model and these texts.
        show: called with a Tried, or with None before the first.
    """

    def __init__(
        self, model: Any, tokenizer: Any, texts: list[Text], journal: Path,
        show: Callable[[Trials, Tried | None], None] = lambda trials, tried: None,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.journal, self._show = model.eval(), tokenizer, Path(journal), show
        self.context = choose_context(model, None)
        self.names = [text.name for text in texts]
        *self.chosen_on, self.judged_on = passages(texts, tokenizer)
        self.default = model.learner.levels[0]
        self.key = self._key()
        self.tried = self._kept()

    def _key(self) -> str:
        """Of everything that a try depends on."""
        weights = [float(p.detach().float().sum()) for p in self.model.parameters()]
        decisive = [weights, self.chosen_on, self.default.to_dict(), self.context, READ, PIECES]
        return hashlib.blake2b(json.dumps(decisive).encode(), digest_size=8).hexdigest()

    def _kept(self) -> list[Tried]:
        try:
            found = json.loads(self.journal.read_text("utf-8"))
            return [Tried(**row) for row in found["tried"]] if found["key"] == self.key else []
        except (OSError, ValueError, KeyError, TypeError):
            return []  # none, or of another version: it is made anew

    def try_(self, level: Level) -> Tried:
        """What a rule gains and harms."""
        known = next((t for t in self.tried if (t.lr, t.rank) == (level.lr, level.rank)), None)
        if known is None:
            began = time.monotonic()
            set_level(self.model, level)
            gains, harms = zip(*(self.measured(ids, self.own) for ids in self.chosen_on))
            gain, harm, size = _mean(gains), _mean(harms), self.model.state_bytes()
            most = max(HARM, WORTH * gain, self.tried[0].harm if self.tried else harm)
            known = Tried(level.lr, level.rank, size, gain, harm, harm > most, time.monotonic() - began)
            self.tried.append(known)
            write_text(self.journal, json.dumps({"key": self.key, "tried": [asdict(t) for t in self.tried]}))
        self._show(self, known)
        return known

    @property
    def own(self) -> list[tuple[list[int], float]]:
        """Texts of the model's own making, and bits per byte of each without levels."""
        if not hasattr(self, "_own"):
            made = own_texts(self.model, self.tokenizer, range(PIECES))
            self._own = [(ids, self._bits(None, ids)) for ids in made]
        return self._own

    @torch.no_grad()
    def measured(self, ids: list[int], own: list[tuple[list[int], float]]) -> tuple[float, float]:
        """Gain on the last third of a passage after the rest was read, and harm to the model's own texts."""
        cut = len(ids) * READ // (READ + AFTER)
        row = torch.tensor([[self.tokenizer.eos_token_id, *ids[:cut]]], device=next(self.model.parameters()).device)
        cache = self.model(row, use_cache=True, next_tokens=row[:, :1]).past_key_values
        self.model.finish(cache, row[:, :1])
        after = ids[cut:]
        harm = [self._bits(cache, made) - before for made, before in own]
        return self._bits(None, after) - self._bits(cache, after), _mean(harm) if harm else 0.0

    def _bits(self, cache: LevelsCache | None, ids: list[int]) -> float:
        nats = -float(score(self.model, cache, ids, self.tokenizer.eos_token_id, self.context).double().sum())
        return nats / math.log(2) / max(1, len(self.tokenizer.decode(ids).encode()))


def calibrated(trials: Trials) -> dict[str, Any]:
    """Search: the rate up while that gains and does not harm, else down once; then twice the rank. Sets the rule.

    Returns:
        texts; tried, a row for each rule; chosen, its lr and rank; gain_default and gain_chosen on the passage that
        chose nothing; kept: whether the default stays, as the chosen rule was not ahead there.
    """
    level, began = trials.default, time.monotonic()
    trials._show(trials, None)
    best, top = level, trials.try_(level)

    def better(candidate: Level) -> bool:
        nonlocal best, top
        found = trials.try_(candidate)
        if found.gain <= top.gain or found.harms:
            return False
        best, top = candidate, found
        return True

    if better(replace(level, lr=2 * level.lr)):
        better(replace(level, lr=4 * level.lr))
    else:
        better(replace(level, lr=level.lr / 2))
    if level.rank is not None and 2 * level.rank <= _narrowest(trials.model):
        better(replace(best, rank=2 * level.rank))
    gains = {}
    for rule in dict.fromkeys((level, best)):
        set_level(trials.model, rule)
        gains[rule] = trials.measured(trials.judged_on, [])[0]
    kept = best != level and gains[best] <= gains[level]
    set_level(trials.model, level if kept else best)
    return {
        "texts": trials.names, "tried": [asdict(t) for t in trials.tried], "chosen": {"lr": best.lr, "rank": best.rank},
        "gain_default": gains[level], "gain_chosen": gains[best], "kept": kept,
        "seconds": time.monotonic() - began,
    }  # fmt: skip


def as_text(found: dict[str, Any]) -> str:
    """What `calibrated` found, for a person: the table of what was tried, and what came of it."""
    texts = "1 text" if len(found["texts"]) == 1 else f"{len(found['texts'])} texts"
    lines = [f"calibrated on {texts} in {found['seconds'] / 60:.1f} minutes, bits per byte:"]
    lines.append("     lr  rank  state MB    gain    harm")
    for row in found["tried"]:
        chosen = "  chosen" if all(row[name] == found["chosen"][name] for name in ("lr", "rank")) else ""
        refused = "  harms" * row["harms"]
        lines.append(f"{row['lr']:7g} {row['rank'] or '-':>5} {row['state_bytes'] / 1e6:9.1f} {row['gain']:7.3f} "
                     f"{row['harm']:+7.3f}{chosen}{refused}")  # fmt: skip
    chosen, default, stays = found["gain_chosen"], found["gain_default"], "; the default stays" * found["kept"]
    lines.append(f"on a passage that chose nothing: gain {chosen:.3f}, by the default {default:.3f}{stays}")
    return "\n".join(lines)


def set_level(model: Any, level: Level) -> None:
    """Let a model's one level learn by another rule, now and when it was saved and loaded."""
    model.learner = replace(model.learner, levels=(level,))
    if hasattr(model, "recipe"):
        model.recipe = model.recipe | {"levels": [level.to_dict()]}
    else:
        model.config.cms_levels = [level.to_dict()]


def _narrowest(model: Any) -> int:
    return min(min(m.weight.shape) for m in model.learner.modules[0])


def _mean(values: Any) -> float:
    return sum(values) / len(values)
