"""Two novel languages learned one after the other from verse pairs read once (NL Sec. 9, Fig. 8).

A language model reads pairs of a language and English, then pairs of the next language. It is asked to translate
verses of a book that it has not read: from each language alone, and from the first after it read the second. The same
weights are one level, or shared out over two or three, or fine-tuned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.shared.continual.pretrained import pretrained
from experiments.shared.continual.rows import by_contender
from experiments.shared.continual.streams import generate, prefilled, score
from experiments.shared.continual.student import FINE_TUNING, Student
from experiments.shared.continual.study import ContinualStudy, ContinualWork, LearnerContender, StreamJob
from experiments.shared.data import find_data
from experiments.shared.work import Progress, Row
from experiments.translation import bible, report
from experiments.translation.bible import Pair

GROUP = "Continual learning"
QUESTION = "Two unknown languages, one after the other: what is left of the first (NL Fig. 8)?"

TUNING_SEED = 100  # seeds from here on are tested on the tuning book
BLOCKS = [1, 6, 11, 16, 21, 26]  # of 30; on the tuning book far better than the last six, at equal parameters
RATES = {128: 1e-3, 512: 1e-3, 2048: 2e-3}  # by chunk size, chosen on the tuning book
STAGES = ("alone", "after both")  # right after reading a language; after reading every language


@dataclass
class Translation(ContinualStudy):
    """How much is read and how it is tested. Books count as in the Bible: 43 John, 44 Acts."""

    name: str = "translation"
    languages: list[str] = field(default_factory=lambda: ["galela", "uma"])  # in the order of reading
    verses: int = 80  # of each language
    longest: int = 96  # tokens of a pair
    context: int = 512  # tokens after which attention begins anew, and tokens of a fine-tuning step
    shown: int = 2048  # tokens of the stream's end that in-context learning has before it
    test_book: int = 43
    tuning_book: int = 44
    tests: int = 32  # verses of each language
    length: int = 40  # tokens of a translation
    batch: int = 24

    def methods(self) -> tuple[str, ...]:
        return ("nothing", "context", "levels", FINE_TUNING)

    def smoke(self) -> Translation:
        return self.changed(verses=8, tests=4, length=6, shown=128, seeds=[0, 1])


@dataclass(frozen=True)
class Lesson:
    """A language of one seed: its stream as tokens, and pairs to translate."""

    stream: list[int]
    tests: list[Pair]


class TranslationWork(ContinualWork):
    """Reads and tests; `folder` holds the verses."""

    def __init__(self, settings: Translation, folder: Path) -> None:
        super().__init__(settings, ",".join(f"{n} {(folder / f'{n}.jsonl.gz').stat().st_size}" for n in
                                            settings.languages))  # fmt: skip
        self.folder = folder

    def lessons(self, seed: int, encode: bible.Encode) -> dict[str, Lesson]:
        """The languages of a seed."""
        s, found = self.settings, {}
        held_out = [s.test_book, s.tuning_book]
        book = held_out[seed >= TUNING_SEED]
        for place, name in enumerate(s.languages):
            verses = bible.load(str(self.folder / f"{name}.jsonl.gz"))
            pairs = bible.draw(verses, name, encode, s.verses, s.longest, 10 * seed + place, without=held_out)
            tests = bible.draw(verses, name, encode, s.tests, s.longest, 10 * seed + place, books=[book])
            found[name] = Lesson(bible.stream(pairs, encode), tests)
        return found

    def run(self, job: StreamJob, progress: Progress | None) -> dict[str, Any]:
        model, tokenizer = pretrained(self.settings.model, self.settings.dtype)
        contender = self.settings.contender(job.contender)
        lessons = self.lessons(job.seed, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
        student = Student(model, contender, self.settings.context)
        if contender.method == "nothing":
            found = {n: self.test(student, x.tests, tokenizer) for n, x in lessons.items()}
            return {"figures": {n: dict.fromkeys(STAGES, f) for n, f in found.items()}, "curve": []}
        figures: dict[str, dict[str, Any]] = {name: {} for name in lessons}
        curve, (first, *others) = [], lessons
        for name, lesson in lessons.items():  # in sequence
            curve += self.read(student, lesson)
            if name == first:
                figures[name]["alone"] = self.test(student, lesson.tests, tokenizer)
            if progress and curve:
                progress(len(curve), curve[-1])
        for name, lesson in lessons.items():
            figures[name]["after both"] = self.test(student, lesson.tests, tokenizer)
        for name in others:
            last = name == others[-1] and len(lessons[name].stream) >= self.settings.shown
            if contender.method == "context" and last:  # it has nothing else before it
                figures[name]["alone"] = figures[name]["after both"]
                continue
            student = Student(model, contender, self.settings.context)
            self.read(student, lessons[name])
            figures[name]["alone"] = self.test(student, lessons[name].tests, tokenizer)
        return {"figures": figures, "curve": curve, "tokens": {n: len(x.stream) for n, x in lessons.items()}}

    def read(self, student: Student, lesson: Lesson) -> list[float]:
        """Let a student read a language: the loss of each window, if its way to learn is to read."""
        if student.contender.method in ("nothing", "context"):
            student.read_so_far += lesson.stream
            return []
        return student.read(lesson.stream)

    def test(self, student: Student, tests: Sequence[Pair], tokenizer: Any) -> dict[str, Any]:
        """chrF of greedy translations, and bits per byte of the English given the source."""
        settings = self.settings
        shown = student.read_so_far[-settings.shown :] if student.contender.method == "context" else []
        prompts, targets = [p.prompt for p in tests], [p.target for p in tests]
        with student.adapted() as model:
            losses = score(model, prompts, targets, prefilled(model, shown), settings.batch)
            written = generate(model, prompts, settings.length, targets[0][-1], settings.batch, shown)
        texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in written]
        size = sum(len(p.text.encode()) + 1 for p in tests)
        examples = [[p.text, t] for p, t in list(zip(tests, texts))[:3]]
        return {"chrf": chrf(texts, [p.text for p in tests]), "bits": sum(losses) / math.log(2) / size,
                "examples": examples}  # fmt: skip

    def result(self, row: dict[str, Any]) -> str:
        (name, first), *_ = row["figures"].items()
        parts = [f"{stage} chrF {first[stage]['chrf']:.1f}, {first[stage]['bits']:.3f} bits" for stage in STAGES]
        return f"{name} " + ", ".join(parts)


def chrf(texts: Sequence[str], references: Sequence[str]) -> float:
    """chrF2 of a corpus, 0 to 100."""
    try:
        from sacrebleu import corpus_chrf
    except ImportError:
        raise ValueError("chrF needs sacrebleu: pip install 'nestling[eval]'") from None
    return corpus_chrf(list(texts), [list(references)]).score


def defaults() -> Translation:
    """The experiment's settings."""
    place = {"blocks": BLOCKS, "target_modules": ["down_proj"]}

    def levels(*sizes: int) -> LearnerContender:
        chosen = [{"chunk_size": size, "lr": RATES[size], "optimizer": "adamw"} for size in sizes]
        return LearnerContender(f"{len(sizes)} level" + "s" * (len(sizes) > 1), "levels", chosen, place)

    weights = [{"chunk_size": 128}]
    contenders = [
        LearnerContender("no levels", "nothing"),
        LearnerContender("in-context learning", "context"),
        *(levels(*sizes) for sizes in ((128,), (128, 512), (128, 512, 2048))),
        LearnerContender("fine-tuning", FINE_TUNING, weights, place, {"lr": 1e-3, "step": 128}),
        LearnerContender("fine-tuning, all weights", FINE_TUNING, options={"lr": 1e-4, "step": 128}),
    ]
    return Translation(contenders=contenders)


def work(settings: Translation, data: str | Path | None, smoke: bool) -> TranslationWork:
    """What does the jobs."""
    files = [f"{name}.jsonl.gz" for name in settings.languages]
    return TranslationWork(settings, find_data(data, "bible", files, bible.SOURCE))


def plan(settings: Translation, contenders: list[LearnerContender], row: Row) -> list[StreamJob]:
    """Every contender on every seed."""
    return [StreamJob(c.name, seed) for seed in settings.seeds for c in contenders]


def summarize(settings: Translation, contenders: list[LearnerContender], row: Row) -> dict[str, Any]:
    """Means and spreads over seeds."""
    return report.summary(settings, by_contender(contenders, settings.seeds, row))


table, plot = report.table, report.plot
