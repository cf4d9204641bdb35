"""Classes that arrive group by group, in a stream read once: what is known of all seen, and what is forgotten.

Labelled texts of CLINC150 and Banking77; after a group, held-out texts of every class seen so far are classified,
without a hint at their group, by spelling a class's name. "Calibrated" subtracts how likely each name is after texts
without content: for every contender alike.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from experiments.classes import intents
from experiments.classes.baselines import METHODS
from experiments.classes.constrain import Format
from experiments.classes.contenders import contenders
from experiments.classes.jobs import ClassJob, plan
from experiments.classes.learner import ClassLearner, Setup
from experiments.classes.report import plot, summarize, table
from experiments.classes.small_models import OURS, ours
from experiments.shared.continual.pretrained import pretrained
from experiments.shared.continual.study import ContinualStudy, ContinualWork, LearnerContender
from experiments.shared.work import Progress

GROUP = "Continual learning"
QUESTION = "Intents arrive group by group: what is known at the end (NL Fig. 6)?"
ENTRIES = "groups"  # of the summary

__all__ = ["ClassJob", "Classes", "defaults", "plan", "plot", "summarize", "table", "work"]

TUNING_SEED = 100  # seeds from here on are tested on the validation part


@dataclass
class Classes(ContinualStudy):
    """Sizes of the streams. `model` is what contenders start from that name none in their options."""

    name: str = "classes"
    data: list[str] = field(default_factory=lambda: ["clinc150", "banking77"])
    shots: int = 5  # examples of a class to learn from
    tests: int = 2  # texts of a class to test on
    every: int = 5  # groups between two tests; the first and the last are always tested
    window: int = 2048  # tokens attention reaches back
    small: dict[str, Any] = field(default_factory=dict)  # changes to `small.Pretraining`
    # the data set that a small model is trained on, by the one it then meets
    sources: dict[str, Any] = field(default_factory=lambda: {"banking77": "clinc150", "letters": "letters"})

    def methods(self) -> tuple[str, ...]:
        return tuple(METHODS)

    def smoke(self) -> Classes:
        chosen = [asdict(c) for c in self.contenders if c.options.get("model") in OURS]
        return self.changed(contenders=chosen, data=["letters"], shots=3, tests=2, window=256, seeds=[0, 1],
                            small={"steps": 3, "hidden": 32, "inner": 32, "layers": 2, "classes": 3})  # fmt: skip

    def decisive(self, job: ClassJob) -> dict[str, Any]:
        values = super().decisive(job)
        values.pop("data")
        return values

    def stages(self, groups: int) -> list[int]:
        """The groups after which is tested."""
        return [g for g in range(groups) if g in (0, groups - 1) or g % self.every == self.every - 1]


def defaults() -> Classes:
    """The experiment's settings, tuned on `TUNING_SEED`."""
    return Classes(contenders=contenders())


def follow(
    student: ClassLearner, stream: intents.ClassStream, stages: list[int], progress: Progress | None = None
) -> list:
    """Learn group by group; for every stage the share answered rightly: {variant: [group]}."""
    found = []
    for g, group in enumerate(stream.groups):
        student.learn(group)
        if g not in stages:
            continue
        tests = [e for part in stream.tests[: g + 1] for e in part]
        answers = student.answer([e.text for e in tests], stream.seen(g))
        row: dict[str, Any] = {"group": g, "classes": len(stream.seen(g))}
        for variant, given in answers.items():
            right, shares = [a == e.label for a, e in zip(given, tests, strict=True)], []
            for part in stream.tests[: g + 1]:
                shares.append(sum(right[: len(part)]) / len(part))
                right = right[len(part) :]
            sizes = [len(part) for part in stream.tests[: g + 1]]
            row[variant] = {"groups": shares, "all": sum(s * n for s, n in zip(shares, sizes)) / sum(sizes)}
        found.append(row)
        if progress:
            progress(g, row["calibrated"]["all"])
    return found


def forgetting(stages: list[dict[str, Any]], variant: str) -> float:
    """The mean over groups of the best earlier accuracy minus the last, over groups tested before the last stage."""
    *earlier, last = [s[variant]["groups"] for s in stages]
    groups = range(max((len(e) for e in earlier), default=0))
    drops = [max(e[g] for e in earlier if g < len(e)) - last[g] for g in groups]
    return sum(drops) / len(drops) if drops else 0.0


class ClassesWork(ContinualWork):
    """Does the jobs; `root` holds the data sets' folders (None: where NESTLING_DATA says)."""

    def __init__(self, settings: Classes, root: str | Path | None = None) -> None:
        super().__init__(settings)
        self.root = root
        for name in settings.data:
            self.load(name)  # a missing one is an error before the first run

    def folder(self, name: str) -> str:
        return "" if name == "letters" else str(intents.find(self.root, name))

    def load(self, name: str) -> intents.Intents:
        return intents.load(self.folder(name), name)

    def reads(self, job: ClassJob) -> str:
        names = {job.data}
        if self.settings.contender(job.contender).options.get("model") in OURS:
            names.add(self.settings.sources[job.data])
        return str([(name, self.load(name).fingerprint) for name in sorted(names)])

    def start(self, contender: LearnerContender, data: str) -> tuple[Any, Any]:
        """The model and tokenizer a contender begins with on a data set."""
        name = contender.options.get("model", self.settings.model)
        if name not in OURS:
            return pretrained(name, self.settings.dtype)
        source = self.settings.sources[data]
        return ours(name, [(source, self.folder(source))], self.settings.small)

    def run(self, job: ClassJob, progress: Progress | None) -> dict[str, Any]:
        settings, contender = self.settings, self.settings.contender(job.contender)
        texts = self.load(job.data)
        part = "val" if job.seed >= TUNING_SEED else "test"
        stream = intents.draw(texts, intents.GROUPS[job.data], settings.shots, settings.tests, job.seed, part)
        model, tokenizer = self.start(contender, job.data)
        torch.manual_seed(job.seed)
        window = min(settings.window, contender.options.get("window", settings.window))
        student = METHODS[contender.method](Setup(model, Format(tokenizer, texts.labels), window, job.seed), contender)
        stages = follow(student, stream, settings.stages(len(stream.groups)), progress)
        figures: dict[str, Any] = {"stages": stages, "forwards": student.forwards, "backwards": student.backwards}
        figures["parameters"] = student.parameters
        for variant in ("plain", "calibrated"):
            figures[variant] = {
                "final": stages[-1][variant]["all"],
                "mean": sum(s[variant]["all"] for s in stages) / len(stages),
                "forgetting": forgetting(stages, variant),
            }
        return figures

    def result(self, row: dict[str, Any]) -> str:
        return f"accuracy {row['plain']['final']:.3f}, calibrated {row['calibrated']['final']:.3f}"

    def check(self, contenders: list[LearnerContender]) -> None:
        """A pre-trained model that contenders name must be there."""
        for name in {c.options.get("model", self.settings.model) for c in contenders} - {*OURS}:
            pretrained(name, self.settings.dtype)


def work(settings: Classes, data: str | Path | None, smoke: bool) -> ClassesWork:
    """What does the jobs; `data` is the folder that holds the data sets' folders."""
    return ClassesWork(settings, data)
