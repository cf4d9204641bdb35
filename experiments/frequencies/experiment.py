"""How many levels, and how slow the slowest: loss along a long document, and keys it must remember (NL Fig. 7).

Attention reaches a few hundred tokens back and then begins anew: what lies before is known to the levels alone. The
same weights are shared out over one, two or three levels, whatever their frequencies: rows of equal parameters. What
the levels' gradients cost is set against plain attention that reaches further back.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.domains import experiment as domains
from experiments.domains.experiment import BLOCKS
from experiments.frequencies.needles import Answer, Haystack, ask, build, encoder, held
from experiments.shared.continual.pretrained import pretrained
from experiments.shared.continual.streams import adapted, learner, read
from experiments.shared.continual.study import ContinualStudy, ContinualWork, LearnerContender, StreamJob
from experiments.shared.data import find_data
from experiments.shared.report import COLOURS, figure, markdown, pm, spread
from experiments.shared.work import Progress, Row

GROUP = "Continual learning"
QUESTION = "How many levels, and how slow the slowest (NL Fig. 7)?"

BASE = "no levels"
STACK = {"blocks": BLOCKS, "target_modules": ["down_proj"]}  # six blocks divide by 1, 2 and 3 levels
RATES = domains.RATES | {8192: domains.RATES[2048]}  # by chunk size; nothing was searched for the slowest
TUNING_SEED = 100  # seeds from here on read the book that no other seed reads


@dataclass
class Frequencies(ContinualStudy):
    """Sizes of the documents, and what hides in them."""

    name: str = "frequencies"
    length: int = 9600  # tokens of a document
    context: int = 512  # tokens after which attention begins anew
    edges: list[int] = field(default_factory=lambda: [0, 512, 1024, 2048, 4096, 8192])  # of the bins by position
    beyond: int = 12  # needles that attention has let go when it is asked for them
    inside: int = 4  # needles it still holds
    tuning_text: str = "samuel-pepys--the-diary.txt"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.length % self.context:
            raise ValueError(f"length {self.length} is a multiple of context {self.context}: attention would hold "
                             "nothing when it is asked for the needles")  # fmt: skip

    def methods(self) -> tuple[str, ...]:
        return ("levels", "attention")

    def smoke(self) -> Frequencies:
        chosen = [c for c in self.contenders if c.name in (BASE, "128", "128 + 512")]
        return replace(self, contenders=chosen, length=1200, edges=[0, 512], beyond=2, inside=2, seeds=[0, 1])

    @property
    def bins(self) -> list[tuple[int, int]]:
        """Positions [first, stop)."""
        return list(itertools.pairwise([*(e for e in self.edges if e < self.length), self.length]))


def defaults() -> Frequencies:
    """The experiment's settings."""

    def levels(*sizes: int) -> LearnerContender:
        chosen = [{"chunk_size": size, "lr": RATES[size], "optimizer": "adamw"} for size in sizes]
        return LearnerContender(" + ".join(map(str, sizes)), "levels", chosen, STACK)

    further = LearnerContender("attention over 4,096", "attention", options={"context": 4096})
    contenders = [LearnerContender(BASE, "attention"), further]
    contenders += [levels(*c) for c in ((128,), (512,), (2048,), (8192,), (128, 512), (128, 2048),
                                        (128, 512, 2048))]  # fmt: skip
    return Frequencies(contenders=contenders)


@functools.lru_cache(maxsize=8)
def book(path: str, model: str, dtype: str, part: float, length: int) -> tuple[int, ...]:
    """`length` tokens of a file from the share `part` of it on."""
    _, tokenizer = pretrained(model, dtype)
    text = Path(path).read_text(encoding="utf-8")
    start = text.index(" ", int(part * len(text))) + 1
    ids = tokenizer(text[start : start + 12 * length], add_special_tokens=False)["input_ids"][:length]
    if len(ids) < length:
        raise ValueError(f"{path} ends before {length} tokens from {part:.0%} of it on: choose longer files")
    return tuple(ids)


def haystack(settings: Frequencies, folder: Path, seed: int) -> Haystack:
    """The document of a seed: part of a book, with needles."""
    _, tokenizer = pretrained(settings.model, settings.dtype)
    files = sorted(f for f in folder.glob("*.txt") if (f.name == settings.tuning_text) == (seed >= TUNING_SEED))
    if not files:
        raise ValueError(f"{folder} holds no file to read for seed {seed}: it needs .txt files, one of them "
                         f"{settings.tuning_text} (-o tuning_text=NAME)")  # fmt: skip
    part = random.Random(seed).uniform(0.1, 0.7)
    text = book(str(files[seed % len(files)]), settings.model, settings.dtype, part, settings.length)

    @functools.cache
    def ends(token: int) -> bool:
        return tokenizer.decode([token]).endswith((".", "!", "?"))

    held = settings.length % settings.context
    spots = [(settings.length - held) * (i + 0.5) / settings.beyond for i in range(settings.beyond)]
    spots = [s - 64 for s in spots] + [settings.length - held * (1 - (i + 0.3) / (settings.inside + 0.3))
                                       for i in range(settings.inside)]  # fmt: skip
    return build(text, settings.length, [max(0, int(s)) for s in spots], encoder(tokenizer), ends, seed)


def study(
    model: nn.Module, settings: Frequencies, contender: LearnerContender, stack: Haystack, tokenizer: Any
) -> dict:
    """Read a document and answer: bits per byte by position (of the book's own tokens), needles, seconds of reading."""
    context = contender.options.get("context", settings.context)
    if contender.levels:
        context, stack_options = None, {"context": settings.context} | contender.stack
        model = learner(model, replace(contender, stack=stack_options))
    ids, started = torch.tensor([stack.ids]), time.thread_time()
    losses, cache = read(model, ids, context=context)
    seconds = time.thread_time() - started
    nats = [0.0, *losses[0].tolist()]  # the first token has no prediction
    straw, bins = stack.straw, []
    for first, stop in settings.bins:
        chosen = [i for i in range(max(1, first), stop) if straw[i]]
        size = len(tokenizer.decode([stack.ids[i] for i in chosen]).encode())
        bins.append({"first": first, "last": stop, "bytes": size, "bits": sum(nats[i] for i in chosen) / math.log(2)})
    encode, count = encoder(tokenizer), settings.beyond
    with adapted(model, cache):
        now = held(cache)
        answers = {"beyond": ask(model, stack.needles[:count], now, encode),
                   "inside": ask(model, stack.needles[count:], now, encode)}  # fmt: skip
    updates = [level.updates if level else 0 for level in cache.levels.levels] if contender.levels else []
    return {"bins": bins, "reading_seconds": seconds, "updates": updates} | {
        side: _mean(found) for side, found in answers.items()
    }


def _mean(answers: list[Answer]) -> dict[str, float]:
    return {name: sum(getattr(a, name) for a in answers) / len(answers) for name in ("exact", "chosen", "margin")}


class FrequenciesWork(ContinualWork):
    def __init__(self, settings: Frequencies, folder: Path) -> None:
        super().__init__(settings, ", ".join(f"{f.name} {f.stat().st_size}" for f in sorted(folder.glob("*.txt"))))
        self.folder = folder

    def run(self, job: StreamJob, progress: Progress | None) -> dict[str, Any]:
        model, tokenizer = pretrained(self.settings.model, self.settings.dtype)
        stack = haystack(self.settings, self.folder, job.seed)
        return study(model, self.settings, self.settings.contender(job.contender), stack, tokenizer)

    def result(self, row: dict[str, Any]) -> str:
        return f"{per_byte(row['bins']):.3f} bits per byte, needles beyond {row['beyond']['chosen']:.2f}"


def work(settings: Frequencies, data: str | Path | None, smoke: bool) -> FrequenciesWork:
    """What does the jobs, on the books in `data`."""
    source = "long books as plain text, for example public-domain ones from standardebooks.org"
    return FrequenciesWork(settings, find_data(data, "books", [settings.tuning_text], source))


def plan(settings: Frequencies, contenders: list[LearnerContender], row: Row) -> list[StreamJob]:
    """Every contender on every seed."""
    return [StreamJob(c.name, seed) for seed in settings.seeds for c in contenders]


def per_byte(bins: list[dict[str, Any]]) -> float:
    """Bits per byte over bins."""
    return sum(b["bits"] for b in bins) / sum(b["bytes"] for b in bins)


def summarize(settings: Frequencies, contenders: list[LearnerContender], row: Row) -> dict[str, Any]:
    """Means and spreads over seeds; gains are taken against the model without levels on the same document."""
    found, base = [], {seed: row(StreamJob(BASE, seed)) for seed in settings.seeds}
    for contender in contenders:
        rows = {seed: r for seed in settings.seeds if (r := row(StreamJob(contender.name, seed)))}
        if not rows:
            continue
        pairs = [(r, base[seed]) for seed, r in rows.items() if base[seed]]
        one = next(iter(rows.values()))
        bits = lambda r, at: per_byte(r["bins"][at : at + 1])  # noqa: E731
        figures = {
            "contender": contender.name,
            "chunks": [level["chunk_size"] for level in contender.levels],
            "levels": contender.levels,
            "updates": one["updates"],
            "bits": spread(per_byte(r["bins"]) for r in rows.values()),
            "gain": spread(per_byte(b["bins"][1:] or b["bins"]) - per_byte(r["bins"][1:] or r["bins"])
                           for r, b in pairs),
            "by_position": [spread(bits(b, at) - bits(r, at) for r, b in pairs) for at in range(len(settings.bins))],
            "reading_seconds": spread(r["reading_seconds"] for r in rows.values()),
        }  # fmt: skip
        for side in ("beyond", "inside"):
            figures[side] = {k: spread(r[side][k] for r in rows.values()) for k in ("exact", "chosen", "margin")}
        found.append(figures)
    return {
        "experiment": "frequencies",
        "length": settings.length,
        "context": settings.context,
        "bins": settings.bins,
        "needles": {"beyond": settings.beyond, "inside": settings.inside},
        "seeds": len(settings.seeds),
        "contenders": found,
    }


def table(summary: dict[str, Any]) -> str:
    """The figures as Markdown: loss, loss by position, needles."""
    rows, places, keys = [], [], []
    for c in summary["contenders"]:
        rows.append([c["contender"], pm(c["bits"]), pm(c["gain"], 4), ", ".join(map(str, c["updates"])) or "-",
                     pm(c["reading_seconds"], 0)])  # fmt: skip
        places.append([c["contender"], *(pm(p, 3) for p in c["by_position"])])
        beyond, inside = c["beyond"], c["inside"]
        keys.append([c["contender"], pm(beyond["chosen"], 2), pm(beyond["margin"], 2), pm(beyond["exact"], 2),
                     pm(inside["chosen"], 2), pm(inside["margin"], 2), pm(inside["exact"], 2)])  # fmt: skip
    needles, context = summary["needles"], summary["context"]
    text = markdown(["chunks of the levels", "bits per byte", f"gain beyond {context} tokens", "updates",
                     "seconds of reading"], rows)  # fmt: skip
    text += "\nGain in bits per byte by position:\n\n"
    text += markdown(["chunks of the levels", *(f"{a:,}-{b:,}" for a, b in summary["bins"])], places)
    text += "\nNeedles:\n\n"
    sides = [f"{side}: {what}" for side in ("beyond", "inside") for what in ("chosen", "margin", "exact")]
    text += markdown(["chunks of the levels", *sides], keys)
    beyond, inside = needles["beyond"], needles["inside"]
    text += f"\nDocuments of {summary['length']:,} tokens of book text, one for each of {summary['seeds']} seeds, mean "
    text += f"± standard deviation. Attention begins anew every {context} tokens (or as said). All rows with levels "
    text += "learn in the same weights, shared out over the levels: a row with one chunk size is the control of one "
    text += f"frequency. Gain: bits per byte less than {BASE}, on the same document. Needles are asked for at the end: "
    text += f"{beyond} that attention of {context} tokens has let go (beyond; chance is {1 / beyond:.2f}), {inside} "
    text += f"that it still holds (inside; chance is {1 / inside:.2f}). Chosen: the right number is likelier than "
    text += "every other one of its group. Margin: its log-probability minus the mean of the others', in nats. Exact: "
    text += "all digits, greedily.\n"
    return text


def plot(summary: dict[str, Any], path: Path) -> None:
    """Gain and needles by number of levels, a line for each slowest level; and the gain by position."""
    panels = [
        (lambda c: c["gain"], f"Gain beyond {summary['context']} tokens", "bits per byte less than no levels", None),
        (lambda c: c["beyond"]["chosen"], "Needles beyond attention", "chosen", 1 / summary["needles"]["beyond"]),
        (lambda c: c["inside"]["chosen"], "Needles in attention", "chosen", 1 / summary["needles"]["inside"]),
    ]
    levels = [c for c in summary["contenders"] if c["chunks"]]
    slowest = sorted({c["chunks"][-1] for c in levels})
    base = next((c for c in summary["contenders"] if c["contender"] == BASE), None)
    with figure(path, 4, (17, 4.2)) as axes:
        for axis, (value, title, label, chance) in zip(axes, panels):
            for n, size in enumerate(slowest):
                mine = sorted((c for c in levels if c["chunks"][-1] == size), key=lambda c: len(c["chunks"]))
                x = [len(c["chunks"]) + 0.05 * (n - len(slowest) / 2) for c in mine]
                found = [value(c) or {"mean": math.nan, "std": 0} for c in mine]
                axis.errorbar(x, [f["mean"] for f in found], [f["std"] for f in found], marker="o", capsize=3,
                              color=COLOURS[n], label=f"slowest every {size:,}")  # fmt: skip
            if base and value(base):
                axis.axhline(value(base)["mean"], color="0.3", linewidth=1, label=BASE)
            if chance:
                axis.axhline(chance, color="0.6", linestyle=":", label="chance")
            axis.set(title=title, ylabel=label, xlabel="levels", xticks=[1, 2, 3], xlim=(0.7, 3.3))
        axes[0].legend(fontsize=8)
        lines = [line for line in axes[1].get_lines() if line.get_label() in (BASE, "chance")]
        axes[1].legend(handles=lines, fontsize=8, loc="upper right")
        middles = range(len(summary["bins"]))
        for c in (c for c in summary["contenders"] if c["contender"] != BASE):
            style = ("--", ":", "-.", "-")[min(len(c["chunks"]), 3)]
            colour = COLOURS[slowest.index(c["chunks"][-1])] if c["chunks"] else "black"
            mean = [math.nan if p is None else p["mean"] for p in c["by_position"]]
            axes[3].plot(middles, mean, style, marker=".", color=colour, label=c["contender"])
        axes[3].set_xticks(middles, [f"{a:,}-\n{b:,}" for a, b in summary["bins"]], fontsize=8)
        axes[3].axhline(0, color="0.5", linewidth=0.8)
        axes[3].set(title="Gain by position", xlabel="tokens", ylabel="bits per byte less than no levels")
        axes[3].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1))
