"""Reading with the default levels: what they gain on a text that was read, what they harm, and what they cost.

A model reads a text once. Then, in a fresh context, it is scored on that text, on the text's own continuation, and on
ordinary text that nobody read. Settings were chosen on other texts than these.
"""

from __future__ import annotations

import functools
import hashlib
import math
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from experiments.defaults import report, texts
from experiments.defaults.small_models import BOOKS, FAMILIES, trained
from experiments.defaults.texts import ROOM, Source
from experiments.shared.continual.pretrained import pretrained
from experiments.shared.continual.streams import adapted, learner, read
from experiments.shared.continual.study import ContinualStudy, ContinualWork, LearnerContender, StreamJob
from experiments.shared.corpus import find_files
from experiments.shared.data import find_data
from experiments.shared.work import Progress, Row
from nestling.cms.anchor import set_anchor
from nestling.cms.defaults import FADE, RANK, RATE, default_blocks, default_levels, fast_levels
from nestling.models.hope.levels import give_levels
from nestling.models.hope.modeling import HopeForCausalLM
from nestling.schedule import Level
from nestling.sessions import find_texts
from nestling.sessions.calibrate import HARM, WORTH, Trials, calibrated, set_level
from nestling.sessions.check import ANCHORS, own_texts
from nestling.sessions.snapshots import FIRST, nearest

GROUP = "Continual learning"
QUESTION = "A text is read once with no option chosen: what is gained, what is harmed, what does it cost?"
ENTRIES = "found"

BASE, DEFAULT = report.BASE, report.DEFAULT
ANCHORED, CALIBRATED, FAST = "default, anchored", "default, calibrated", "default, fast"
SMOLLM2 = "smollm2-135m"
DATA = "a folder with `books`, `bible`, `clinc150` and `banking77`; the experiment's README says where they come from"


@dataclass
class Defaults(ContinualStudy):
    """Which texts and models, and how much of a text is scored."""

    name: str = "defaults"
    seeds: list[int] = field(default_factory=lambda: [0])
    dtype: str = "float32"  # in which levels learn
    models: list[str] = field(default_factory=lambda: [SMOLLM2, *FAMILIES])
    steps: int = 300  # of training of the small ones
    texts: str = "judged"  # or development, on which settings are chosen
    longest: int = 20_000  # tokens that are wanted of a text; longer ones are left out
    context: int = 1024  # tokens after which attention begins anew
    ends: int = 256  # tokens at either end of a text that are scored; a text of twice as many is scored whole
    after: int = 128  # tokens of the text's own continuation

    def methods(self) -> tuple[str, ...]:
        return ("none", "levels")

    def smoke(self) -> Defaults:
        chosen = [c for c in self.contenders if c.name in (BASE, DEFAULT)]
        return replace(self, contenders=chosen, models=["byte llama", "byte hope"], steps=3, texts="smoke",
                       ends=64, after=32)  # fmt: skip

    @property
    def sources(self) -> tuple[Source, ...]:
        return tuple(source for source in texts.SETS[self.texts] if source.tokens <= self.longest)

    def decisive(self, job: Any) -> dict[str, Any]:
        elsewhere = ("models", "model", "texts", "longest", *(() if job.model in FAMILIES else ("steps",)))
        return {k: v for k, v in super().decisive(job).items() if k not in elsewhere}


@dataclass(frozen=True)
class TextJob(StreamJob):
    """One contender reads one text, as one model."""

    model: str = SMOLLM2
    text: str = ""
    tokens: int = 0

    @property
    def key(self) -> str:
        return f"{self.model}, {self.text}: {self.contender}"


def defaults() -> Defaults:
    """The experiment's settings. Levels of {} are those that `nestling convert` writes."""

    def one(
        name: str, stack: dict[str, Any] | None = None, longest: int = 20_000, anchor: float = 0.0, **level: Any
    ) -> LearnerContender:
        options = {"longest": longest} | ({"anchor": anchor} if anchor else {})
        return LearnerContender(name, "levels", [{"chunk_size": 64} | level], stack or {}, options)

    return Defaults(contenders=[
        LearnerContender(BASE, "none"),
        LearnerContender(DEFAULT, "levels", options={"choice": True}),  # whether to take what was learned, too
        one("AdamW, rank 16", lr=3e-3, optimizer="adamw", rank=16),
        LearnerContender(ANCHORED, "levels", options={"anchor": 16.0}),
        one("anchored, twice the rate", lr=2 * RATE, optimizer="spectral", rank=RANK, decay=FADE, anchor=16.0),
        one("gradient descent, last blocks", {"blocks": [-4, -3, -2, -1]}, 200, lr=0.1),
        LearnerContender(CALIBRATED, "levels", options={"calibrate": True}),  # on the development texts
        LearnerContender(FAST, "levels", [level.to_dict() for level in fast_levels(None)], options={"choice": True}),
        one("AdamW, dense", longest=1000, lr=2e-4, optimizer="adamw"),
        one("AdamW, dense, last blocks", {"blocks": [-6, -5, -4, -3, -2, -1]}, 200, lr=2e-4, optimizer="adamw"),
    ])  # fmt: skip


def built(plain: nn.Module, contender: LearnerContender, context: int) -> nn.Module:
    """The model that reads."""
    if contender.method == "none":
        return plain
    if isinstance(plain, HopeForCausalLM):
        return give_levels(plain, contender.levels or None)
    if contender.levels:
        count = plain.config.num_hidden_layers
        blocks = [b for b in contender.stack["blocks"] if b >= -count] if "blocks" in contender.stack else None
        return learner(plain, replace(contender, stack=contender.stack | {"context": context, "blocks": blocks}))
    levels = [level.to_dict() for level in default_levels(plain.config)]
    stack = {"context": context, "blocks": default_blocks(plain.config)}
    return learner(plain, replace(contender, levels=levels, stack=stack))


def bits_per_byte(model: nn.Module, tokenizer: Any, ids: list[int], context: int, start: int = 0) -> float:
    """Of a text's tokens from `start` on, read after an end-of-text token; attention begins anew after `context`."""
    row, found = [tokenizer.eos_token_id, *ids], []
    for at in range(0, len(ids), context):
        part = torch.tensor([row[at : at + context + 1]], device=model.device)
        logits = model(part[:, :-1], use_cache=False).logits[0].float()
        found.append(F.cross_entropy(logits, part[0, 1:], reduction="none"))
    size = len(tokenizer.decode(ids).encode()) - len(tokenizer.decode(ids[:start]).encode())
    return torch.cat(found)[start:].sum().item() / math.log(2) / max(1, size)


def speed(model: nn.Module, ids: torch.Tensor) -> float:
    """Seconds of this thread for a forward of one row of tokens."""
    began = time.thread_time()
    model(ids, use_cache=True)
    return time.thread_time() - began


class DefaultsWork(ContinualWork):
    """Reads texts; `folder` holds the data, None for a smoke run, whose texts every machine has."""

    anywhere = True

    def __init__(self, settings: Defaults, folder: Path | None) -> None:
        super().__init__(settings)
        self.folder = folder or Path()
        self.made: dict[str, list[list[int]]] = {}  # texts of each model's own making
        self.rules: dict[str, Level] = {}  # calibrated for each model
        self.files = tuple([folder / "books" / name for name in BOOKS] if folder else find_files(None, smoke=True))

    def check(self, contenders: list[LearnerContender]) -> None:
        if SMOLLM2 in self.settings.models:
            pretrained(SMOLLM2, self.settings.dtype)

    def reads(self, job: TextJob) -> str:
        """Which part of which text, and how; the default's levels too, which the contender does not name."""
        source = next(s for s in self.settings.sources if s.name == job.text)
        default = job.contender in (DEFAULT, ANCHORED, CALIBRATED)
        rule = str(default_levels(None)) + str(default_blocks(None)) if default else ""
        rule += f"{HARM} {WORTH}" if job.contender == CALIBRATED else ""
        end = "" if self.settings.contender(job.contender).method == "none" else "to its end"
        return f"{asdict(source)} {rule}{end}"

    def run(self, job: TextJob, progress: Progress | None) -> dict[str, Any]:
        settings, contender = self.settings, self.settings.contender(job.contender)
        plain, tokenizer = self._model(job.model)
        source = next(s for s in settings.sources if s.name == job.text)
        ids = self._ids(tokenizer, source, source.tokens + settings.after)
        ids, after = ids[: source.tokens], ids[source.tokens :]
        ends = settings.ends
        probes = [ids] if len(ids) <= 2 * ends else [ids[:ends], ids[-ends:]]
        other = [(s.name, self._ids(tokenizer, s, s.tokens)) for s in texts.ELSEWHERE[settings.texts]]
        score = functools.partial(bits_per_byte, tokenizer=tokenizer, context=settings.context)
        with torch.no_grad():
            model, cache, seconds = built(plain, contender, settings.context), None, None
            row = torch.tensor([[tokenizer.eos_token_id, *ids]], device=self.device)
            found: dict[str, Any] = {}
            if contender.options.get("calibrate"):
                set_level(model, self._rule(job.model, model, tokenizer))
                found["rule"] = model.learner.levels[0].to_dict()
            if contender.method == "levels":
                if weight := contender.options.get("anchor"):
                    if job.model not in self.made:  # the same for every text
                        self.made[job.model] = own_texts(model, tokenizer, ANCHORS)
                    made = [[tokenizer.eos_token_id, *found] for found in self.made[job.model]]
                    set_anchor(model, made, weight)
                began = time.thread_time()
                _, cache = read(model, row)
                model.finish(cache, row[:, :1])  # as `nestling learn` does
                seconds = time.thread_time() - began
                part = row[:, : settings.context]
                plain_seconds = speed(plain, part) / part.shape[1] * row.shape[1]  # beside it, under the same load
            timed = cache is not None and self.device == "cpu"  # of a GPU a thread's time says nothing
            if contender.options.get("choice"):
                known = {"text": probes[0], **dict(other)} | ({"after": after} if len(after) == settings.after else {})
                found["choice"] = {
                    name: self._chosen(plain, model, cache, tokenizer, ids) for name, ids in known.items()
                }
            with adapted(model, cache):
                return {
                    "read": len(ids),
                    "digest": self._digest(source),
                    "text_kind": source.kind,
                    "text_bits": sum(score(model, ids=p) * len(p) for p in probes) / sum(map(len, probes)),
                    "after_bits": score(model, ids=after) if len(after) == settings.after else None,
                    "other_bits": {name: score(model, ids=found) for name, found in other},
                    "state_bytes": 0 if cache is None else cache.nbytes,
                    "reading_seconds": seconds if timed else None,
                    "plain_seconds": plain_seconds if timed else None,
                } | found

    def _chosen(self, plain: nn.Module, model: nn.Module, cache: Any, tokenizer: Any, ids: list[int]) -> dict[str, Any]:
        """Whether a reader takes what was learned to a text, and bits per byte of what it has not seen by then."""
        context = self.settings.context
        taken = nearest(model, cache, ids[:FIRST], tokenizer.eos_token_id, context) is None
        without = bits_per_byte(plain, tokenizer, ids, context, FIRST)
        with adapted(model, cache if taken else None):
            return {"levels": taken, "without": without, "bits": bits_per_byte(model, tokenizer, ids, context, FIRST)}

    def _rule(self, name: str, model: nn.Module, tokenizer: Any) -> Level:
        """What `nestling convert --calibrate` chooses for a model on the development texts."""
        if name not in self.rules:
            with tempfile.TemporaryDirectory() as folder:
                for n, source in enumerate(texts.SMOKE if self.settings.texts == "smoke" else texts.DEVELOPMENT):
                    Path(folder, f"{n}.txt").write_text(source.text(self.folder, 4 * source.tokens), encoding="utf-8")
                trials = Trials(model, tokenizer, find_texts([folder]), Path(folder, "tried"))
                calibrated(trials)
            self.rules[name] = model.learner.levels[0]
        return self.rules[name]

    def _model(self, name: str) -> tuple[nn.Module, Any]:
        small = name in FAMILIES
        found = trained(name, self.settings.steps, self.files) if small else pretrained(name, self.settings.dtype)
        return found[0].to(self.device), found[1]

    def _ids(self, tokenizer: Any, source: Source, count: int) -> list[int]:
        text = source.text(self.folder, ROOM * count)
        return tokenizer(text, add_special_tokens=False)["input_ids"][:count]

    def _digest(self, source: Source) -> str:
        """Of the text as it stands on this machine: files of Python and of packages differ between versions."""
        text = source.text(self.folder, ROOM * (source.tokens + self.settings.after))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def result(self, row: dict[str, Any]) -> str:
        return f"{row['text_bits']:.3f} bits per byte of {row['read']:,} tokens"


def work(settings: Defaults, data: str | Path | None, smoke: bool) -> DefaultsWork:
    """What does the jobs."""
    folder = None if smoke and data is None else find_data(data, ".", [f"books/{name}" for name in BOOKS], DATA)
    return DefaultsWork(settings, folder)


def plan(settings: Defaults, contenders: list[LearnerContender], row: Row) -> list[TextJob]:
    """Model by model, each text by text from short to long, so that a run that is cut still tells."""
    return [
        TextJob(c.name, 0, "run", model, source.name, source.tokens)
        for model in settings.models
        for source in settings.sources
        for c in contenders
        if source.tokens <= c.options.get("longest", math.inf)
    ]


def summarize(settings: Defaults, contenders: list[LearnerContender], row: Row) -> dict[str, Any]:
    """Changes against the model without levels, text by text."""
    names, found = [c.name for c in contenders if c.name != BASE], []
    for model in settings.models:
        rows = {}
        for source in settings.sources:
            jobs = {c.name: row(TextJob(c.name, 0, "run", model, source.name, source.tokens)) for c in contenders}
            rows[source.name] = {name: r for name, r in jobs.items() if r}
        if any(BASE in cells for cells in rows.values()):
            found.append(report.of_model(model, names, rows))
    return {"experiment": "defaults", "texts": len(settings.sources), "ends": settings.ends, "found": found}


table, plot = report.table, report.plot
